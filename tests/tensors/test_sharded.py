"""Exchanges of sharded tensors on two ranks, and on three: rows that stay, rows that cross, ranks that hold nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.engines.test_ranks import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_equals_the_slow_way_on_whole_tensors(ranks: int, tmp_path: Path) -> None:
    results = launch("tests.tensors.ranks", directory=tmp_path, ranks=ranks)
    mixed = results.pop("mixed")
    assert {name: found for name, found in results.items() if found != "right"} == {}
    assert len(results) > 50
    assert mixed.startswith("refused")
