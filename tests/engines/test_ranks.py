"""n ranks = one rank, for real: two processes over gloo, under DDP and FSDP2, to the rounding of the stock model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
ROOT = Path(__file__).parents[2]


def launch(module: str, *arguments: str, directory: Path, ranks: int = 2, limit: int = 300) -> Any:
    """Start one process a rank; its ``result.json``, or the log of the first that failed."""
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    logs = [directory / f"rank{rank}.log" for rank in range(ranks)]
    started = []
    for rank, path in enumerate(logs):
        with path.open("w") as log:
            command = [sys.executable, "-W", "ignore", "-m", module, *arguments, str(directory)]
            both = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, cwd=ROOT, env=both, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in started:
            process.wait(limit)
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, path in zip(started, logs, strict=True):
        assert process.returncode == 0, path.read_text()[-6000:]
    return json.loads((directory / "result.json").read_text())


@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(host: str, tmp_path: Path) -> None:
    results = launch("tests.engines.ranks", host, directory=tmp_path)
    for kind in ("llama", "gpt_neo"):
        # AdamW's first steps are signs of the gradient: what little the stock model shows is a few times more where
        # masks leave an entry few terms
        tolerance = 12 * max(results[f"{kind}/stock"]["gap"], 6e-8)
        for name in ("mask", "detach", "zero", "micro", "first", "checkpointing"):
            found = results[f"{kind}/{name}"]
            assert found["gap"] <= tolerance, (kind, name, found, tolerance)
            if "norms" in found:
                assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-5)
                assert found["moved"] > 1e4 * found["gap"]
    for name in ("one forward", "two passes"):
        assert results[f"slots/{name}"]["gap"] < 1e-6


@pytest.mark.slow
def test_the_trainer_on_two_ranks_equals_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    results = launch("tests.engines.trainer_ranks", directory=tmp_path)
    assert results["gap"] < 2e-6
    assert results["loss"][0] == pytest.approx(results["loss"][1], rel=1e-5)
    assert results["norm"][0] == pytest.approx(results["norm"][1], rel=1e-5)
