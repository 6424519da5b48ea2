"""Run a model in float64 throughout, and route it so that every expert has tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .straight import batch_norm

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_CHOICES = (torch.topk, Tensor.topk, torch.argmax, Tensor.argmax)


class Wide(TorchFunctionMode):
    """Everything in float64: casts to narrower floating types go to float64 instead.

    Args:
        scatter: Routers choose at random (always the same way), so that every expert has tokens.
    """

    def __init__(self, scatter: bool = False) -> None:
        super().__init__()
        self.scatter, self.choices = scatter, 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.call(*widened(func, args, kwargs or {}))

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func is F.batch_norm:
            return batch_norm(*args, **kwargs)
        return func(*self.chosen(func, args), **kwargs)

    def chosen(self, func: Callable, args: tuple) -> tuple:
        """The arguments of a choice among scores, with the scores shuffled if asked."""
        if not self.scatter or func not in _CHOICES or not args[0].is_floating_point():
            return args
        self.choices += 1
        generator = torch.Generator().manual_seed(self.choices)
        noise = torch.rand(args[0].shape, generator=generator, dtype=args[0].dtype)
        return (args[0] + 10 * noise * args[0].detach().nan_to_num(0, 0, 0).std().clamp_min(0.1), *args[1:])


def widened(func: Callable, args: tuple, kwargs: dict) -> tuple[Callable, tuple, dict]:
    """The call with narrow floating types replaced by float64."""
    if func in _CASTS:
        return Tensor.to, (args[0], torch.float64), {}
    if any(a in _NARROW for a in args if isinstance(a, torch.dtype)):
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a for a in args)
    if kwargs.get("dtype") in _NARROW:
        kwargs = {**kwargs, "dtype": torch.float64}
    return func, args, kwargs
