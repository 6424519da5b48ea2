"""Run a model in float64 throughout, and route it so that every expert has tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .composite import COMPOSITE, seen_through
from .straight import SOFTMAX, batch_norm, tempered

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
EXPONENTIALS = (torch.exp, Tensor.exp)
_LARGEST = 88.0
"""Beyond, float32 overflows: a model means such values to be masked, and their gradient is not-a-number."""
_CHOICES = (torch.topk, Tensor.topk, torch.argmax, Tensor.argmax)


class Wide(TorchFunctionMode):
    """Everything in float64: casts to narrower floating types go to float64 instead.

    Args:
        scatter: Routers choose as good as at random, so that every expert has tokens.
    """

    def __init__(self, scatter: bool = False) -> None:
        super().__init__()
        self.scatter = scatter

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.call(*widened(func, args, kwargs or {}))

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in COMPOSITE:
            with seen_through(self):
                return func(*args, **kwargs)
        if func is F.batch_norm:
            return batch_norm(*args, **kwargs)
        if func in EXPONENTIALS and args[0].is_floating_point():
            return func(args[0].clamp(max=_LARGEST), *args[1:], **kwargs)
        if func in SOFTMAX and args and args[0].is_floating_point():
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(dim, int):
                return func(tempered(args[0], dim), *args[1:], **kwargs)
        return func(*self.chosen(func, args), **kwargs)

    def chosen(self, func: Callable, args: tuple) -> tuple:
        """The arguments of a choice among scores, with the scores shuffled if asked.

        The noise is a function of each score, so that what is chosen moves along when experts are permuted; a function
        in steps, so that it does not amplify rounding.
        """
        if not self.scatter or func not in _CHOICES or not args[0].is_floating_point():
            return args
        scores = args[0].detach().nan_to_num(0, 0, 0)
        spread = scores.std(correction=0).clamp_min(0.1)
        steps = torch.round(scores / spread * 1e6)
        return (args[0] + 10 * spread * torch.remainder(steps * 0.6180339887, 1), *args[1:])


def widened(func: Callable, args: tuple, kwargs: dict) -> tuple[Callable, tuple, dict]:
    """The call with narrow floating types replaced by float64."""
    if func in _CASTS:
        return Tensor.to, (args[0], torch.float64), {}
    if func is torch.view_as_complex:
        return func, (args[0].contiguous(),), {}  # as a cast to float32 would have left it
    if any(a in _NARROW for a in args if isinstance(a, torch.dtype)):
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a for a in args)
    if kwargs.get("dtype") in _NARROW:
        kwargs = {**kwargs, "dtype": torch.float64}
    return func, args, kwargs


class Settle(Wide):
    """Batch norms take the statistics of what reaches them, or deep nets would fade or overflow; no channels alike."""

    def __init__(self) -> None:
        super().__init__(scatter=True)
        self.generator = torch.Generator().manual_seed(5)

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func is F.batch_norm and isinstance(args[1], Tensor) and args[1].is_leaf and isinstance(args[2], Tensor):
            x, mean, variance = (t.detach() for t in args[:3])
            dims = [d for d in range(x.ndim) if d != 1]
            noise = lambda: torch.rand(mean.shape, generator=self.generator, dtype=mean.dtype)  # noqa: E731
            scale = x.var(dims, correction=0)
            mean.copy_(x.mean(dims) + 0.1 * scale.sqrt() * (noise() - 0.5))
            variance.copy_((scale + 0.1 * scale.mean() + 0.01) * (0.7 + 0.6 * noise()))
        return super().call(func, args, kwargs)
