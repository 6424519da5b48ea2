"""Methods of projected gradients on two ranks, under DDP and FSDP2, equal one process; so do stored gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.engines.test_ranks import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.mark.parametrize("host", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_ranks_equal_one(host: str, tmp_path: Path) -> None:
    results = launch("tests.methods.projection_ranks", host, directory=tmp_path)
    assert len(results) == 7
    for name, gap in results.items():
        assert gap < 1e-10, (name, gap)
