"""Keys and tiered methods on two ranks: swaps are exact, training equals that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.engines.test_ranks import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.mark.parametrize("kind", ["gpt_neo", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(host: str, kind: str, tmp_path: Path) -> None:
    results = launch("tests.keys.ranks", host, kind, directory=tmp_path)
    swap = results["swap"]
    assert swap["there"] == swap["back"] == 0.0
    assert swap["moved"] > 0.1
    assert swap["saving"] == []
    # attention and norms compute in float32: three steps of momentum on two tiers' gradients
    tolerance = 4 * max(results["stock"], 1e-9)
    assert results["gathered"] < 1e-12
    for name in ("C1", "C2", "finetune"):
        for part in ("", " in parts"):
            assert results[f"{name}{part}"] <= tolerance, (name, part, results)
    assert results["both ways to step"] < 1e-10
    if host == "fsdp2":
        assert "FSDP holds gradients that it has not reduced" in results["unreduced"]
    else:
        assert results["C1 in views"] <= tolerance
