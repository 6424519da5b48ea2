"""What goes from rank to rank: every collective that torch dispatches, with the numbers that it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SPACES = ("c10d", "_c10d_functional")
SILENT = ("wait_tensor", "barrier")
INTO = ("alltoall_base", "_allgather_base", "_reduce_scatter_base")
"""They take the output first."""


class Traffic(TorchDispatchMode):
    """Inside the block: name, numbers and bytes of each collective's inputs, as this rank gives them.

    Attributes:
        seen: ``(operation, numbers, bytes)``, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in SPACES and not name.startswith(SILENT):
            given = (
                args[1] if name.startswith(("alltoall_base", "_allgather_base", "_reduce_scatter_base")) else args[0]
            )
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            numbers = sum(t.numel() for t in tensors)
            self.seen.append((name.rstrip("_"), numbers, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def count(call: Any) -> list[tuple[str, int, int]]:
    """The collectives of a call."""
    with Traffic() as traffic, torch.no_grad():
        call()
    return traffic.seen
