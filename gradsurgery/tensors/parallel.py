"""Tensor parallelism: weights cut along their outputs or inputs, and computed with where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.tensors.boxes import is_sharded


def is_tensor_parallel(base: nn.Module) -> bool:
    """Whether ranks compute with the parts of weights that they hold, where FSDP2 would gather them first."""
    gathers = any(parent.__name__ == "FSDPModule" for module in base.modules() for parent in type(module).__mro__)
    return not gathers and any(is_cut(parameter) for parameter in base.parameters())


def is_cut(tensor: Tensor) -> bool:
    """Whether ranks hold parts of a tensor."""
    return is_sharded(tensor) and any(placement.is_shard() for placement in tensor.placements)  # type: ignore[attr-defined]


def is_laid_out(module: nn.Module) -> bool:
    """Whether a module's forward is one of transformers' that lays inputs and outputs out over ranks."""
    return getattr(vars(module).get("forward"), "__module__", "").startswith("transformers.distributed")


def returns_whole(module: nn.Module) -> bool:
    """Whether a module adds up over ranks what it returns: it holds weights cut along their inputs, or is a table."""
    cut = [parameter for parameter in module.parameters() if parameter.dim() == 2 and is_cut(parameter)]
    by_inputs = any(p.is_shard() and p.dim % 2 for parameter in cut for p in parameter.placements)  # type: ignore[attr-defined]
    return by_inputs or isinstance(module, nn.Embedding)


@torch.no_grad()
def lay_out_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Lay gradients out over ranks as their parameters are: that of a table cut by rows comes whole to each rank."""
    for parameter in parameters:
        grad: Any = parameter.grad
        if grad is None or not is_sharded(parameter) or not is_sharded(grad):
            continue
        if grad.placements != parameter.placements:  # type: ignore[attr-defined]
            parameter.grad = grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


@contextmanager
def added_after(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block ``.grad`` is what the block's own backward gives; what was there before is added at its end."""
    held = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in held:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, before in held:
            parameter.grad = before
        raise
    for parameter, before in held:
        if before is not None:
            parameter.grad = before if parameter.grad is None else before + parameter.grad
