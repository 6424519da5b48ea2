"""Saved at one world size, resumed at another: the run that was never interrupted, to its rounding."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.checkpoints.loop import Run, whole
from tests.checkpoints.ranks import ENGINES
from tests.engines.methods import CASES
from tests.engines.test_ranks import launch
from tests.surgery.tiny import gap

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning"),
]
FEW = ["gru", "tiered, in C2", "quarantine, route by label"]
TOLERANCE = 1e-11


def agree(names: list[str], directory: Path, ranks: int) -> None:
    for name in names:
        run = Run(name)
        run.steps(0, 2)
        run.save(directory / name / "one", extra={"steps": 2})
        run.end()
    results = launch("tests.checkpoints.ranks", ";".join(names), directory=directory, ranks=ranks, limit=1500)
    assert results.pop("left behind") == []
    said = results.pop("failing")
    assert said.count("rank 1") == ranks - 1 and said.count("which a checkpoint cannot hold") == ranks
    assert len(results) == len(names) * len(ENGINES) * 3
    for name in names:
        expected = whole(name)
        for engine in ENGINES:
            run = Run(name, resumed=True)
            run.load(directory / name / engine)
            run.steps(2, 3)
            results[f"{name}/one of {engine}"] = gap(run.end(), expected)
    assert {name: found for name, found in results.items() if found > TOLERANCE} == {}


def test_from_two_ranks_to_one_and_back(tmp_path: Path) -> None:
    agree(FEW, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_method_from_many_ranks_to_one_and_back(ranks: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(list(CASES), tmp_path, ranks)
