"""Under FSDP2 a key sends no more than the rows it swaps, and a projection sends sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.engines.test_ranks import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def test_what_goes_from_rank_to_rank(tmp_path: Path) -> None:
    results = launch("tests.engines.traffic_ranks", directory=tmp_path)
    for name, found in results.items():
        sent = [sum(size for _, _, size in seen) for seen in found["seen"]]
        operations = {operation for seen in found["seen"] for operation, *_ in seen}
        if name.startswith("key"):
            assert operations <= {"alltoall_base"}, (name, operations)
            assert 0 < sum(sent) <= found["swapped"], (name, sent, found["swapped"])
        else:
            assert operations == {"allreduce"}, (name, operations)
            numbers = [sum(count for _, count, _ in seen) for seen in found["seen"]]
            # <g, g>, <g, r>, <r, r> of every tensor before, and again after for the metrics
            assert max(numbers) <= 8 * found["tensors"], (name, numbers)
