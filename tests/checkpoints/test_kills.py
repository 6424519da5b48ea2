"""A run that is killed a hundred times loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.test_ranks import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


def killed(ranks: int, kills: int, directory: Path, limit: int) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoints.killed"]
    done = subprocess.run(
        [*command, str(ranks), str(kills), "0", str(directory)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((directory / "result.json").read_text())


def check(result: Any) -> None:
    whole, resumed = result["drawn"]
    assert resumed == whole and len(whole) == result["steps"]
    assert result["equal"]
    assert result["went on"] > 0 and result["steps"] > 2
    last = [f"step-{result['steps'] - k:08d}" for k in (1, 0)]
    assert result["left behind"] == last


def test_a_few_kills(tmp_path: Path) -> None:
    check(killed(1, 3, tmp_path, 300))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 100), (2, 30)])
def test_many_kills_at_random_moments(ranks: int, kills: int, tmp_path: Path) -> None:
    result = killed(ranks, kills, tmp_path, 3600)
    check(result)
    assert result["killed while saving"] > 0, "no kill fell into a save"
