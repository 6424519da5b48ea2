"""What the programs that run as one rank of a group have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed as dist

from gradsurgery.runs import leave_group


@contextmanager
def joined(directory: str | Path) -> Iterator[None]:
    """One rank (RANK of WORLD_SIZE) of a gloo group that meets in ``directory``, on one thread, inside the block.

    Models of the group must be gone when the block ends (a function's locals are), or its threads outlive it and may
    abort the interpreter's shutdown.
    """
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(Path(directory, "store")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        leave_group()
