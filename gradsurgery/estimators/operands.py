"""Products with parts of given weights, seen while they are computed: what fused experts multiply by each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradsurgery.anatomy.space import unwrap

Seen = Callable[[str, int | None, Tensor, bool], None]
"""``seen(name, expert, x, transposed)``: rows ``x`` met one expert's matrix, or all of them ``[expert, rows, n]``."""

_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


class Products(TorchFunctionMode):
    """Calls ``seen`` for every product of rows with a 3-D weight, or with one of its matrices.

    Args:
        weights: The 3-D weights by name; a part of one is known by where it lies in memory.
        seen: What to call.
    """

    def __init__(self, weights: Mapping[str, Tensor], seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.weights = {weight.untyped_storage().data_ptr(): (name, weight) for name, weight in weights.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear or func in _PRODUCTS:
            given = [*args, *(kwargs or {}).values()]
            x, weight = given[0], given[1]
            known = isinstance(weight, Tensor) and self.weights.get(weight.untyped_storage().data_ptr())
            if known and isinstance(x, Tensor):
                self._report(known[0], known[1], x, weight, func is F.linear)
        return func(*args, **(kwargs or {}))

    def _report(self, name: str, whole: Tensor, x: Tensor, weight: Tensor, is_linear: bool) -> None:
        flipped = weight.stride()[-2:] != whole.stride()[-2:]
        transposed = is_linear == flipped  # x W^T reads [out, in], x W reads [in, out]
        if weight.dim() == 3 and x.dim() == 3:
            self.seen(name, None, x, transposed)
        elif weight.dim() == 2:
            expert = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
            self.seen(name, expert, x.reshape(-1, x.shape[-1]), transposed)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Inside the block fused experts multiply expert by expert, where their products can be seen."""
    configs = {id(c): c for m in unwrap(model).modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
