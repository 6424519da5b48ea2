"""Norms with a straight-through gradient: their statistics are constants, or they would couple everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

POWERS = (torch.pow, Tensor.pow, Tensor.__pow__)
MEANS = (torch.mean, Tensor.mean)
STATISTICS = (
    torch.rsqrt,
    Tensor.rsqrt,
    torch.sqrt,
    Tensor.sqrt,
    torch.norm,
    Tensor.norm,
    torch.linalg.norm,
    torch.linalg.vector_norm,
    torch.var,
    Tensor.var,
    torch.std,
    Tensor.std,
    *MEANS,
    *POWERS,
)


CLIPPED = (F.relu, torch.relu, Tensor.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.threshold)
"""Their gradient is zero where they clip, and a unit that clips on every token would go unseen."""


ONE_SIDED = (F.gelu, F.silu, F.mish, F.elu, F.selu)
"""They vanish far out on one side, and with them all that they gate: a little of the input is added."""
SATURATING = (
    F.sigmoid,
    torch.sigmoid,
    Tensor.sigmoid,
    F.tanh,
    torch.tanh,
    Tensor.tanh,
    F.softplus,
    torch.erf,
    Tensor.erf,
)
"""Their gradient vanishes far out, where a unit would go unseen too: a little of the input's is added."""


SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def leak(x: Tensor) -> Tensor:
    """Zero, with the gradient of ``x``."""
    return torch.where(x.isfinite(), x - x.detach(), torch.zeros_like(x))


def faint(x: Tensor) -> Tensor:
    """Zero, with a little of the gradient of ``x`` where its exponential has all but none: states that soon decay."""
    return torch.where((x < -10) & (x > -1000), 5e-5 * (x - x.detach()), torch.zeros_like(x))


def tempered(scores: Tensor, dim: int) -> Tensor:
    """Scores of at most unit spread along ``dim``, so that no softmax saturates; masked ones stay far below.

    Each row by itself, so that what heads have to do with each other stays what it is.
    """
    shown = scores.detach() > -1e4
    kept = torch.where(shown, scores.detach(), torch.zeros_like(scores))
    count = shown.sum(dim, keepdim=True).clamp_min(1)
    mean = kept.sum(dim, keepdim=True) / count
    off = torch.where(shown, kept - mean, torch.zeros_like(kept))
    spread = (off.square().sum(dim, keepdim=True) / count).sqrt().clamp_min(1)
    return torch.where(shown, scores / spread, scores)


def is_statistic(func: Callable, args: tuple, result: Any) -> bool:
    """A number per token that a norm divides by or subtracts, not a feature."""
    if not isinstance(result, Tensor) or not isinstance(args[0], Tensor) or result.ndim == 0:
        return False
    if func in MEANS:  # of features, not over the places of an image or the tokens of a text
        reduced = [d for d, n in enumerate(args[0].shape) if result.ndim == args[0].ndim and n > result.shape[d]]
        return len(reduced) == 1 and reduced[0] in (args[0].ndim - 1, 1 if args[0].ndim == 4 else -1)
    if func in POWERS and not (isinstance(args[1], float) and abs(args[1]) == 0.5):
        return False
    return result.shape[-1] == 1 or result.ndim < args[0].ndim


def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    with torch.no_grad():
        mean, scale = x.mean(dims, keepdim=True), (x.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    y = (x - mean) * scale
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    with torch.no_grad():
        scale = (x.square().mean(dims, keepdim=True) + (eps or torch.finfo(x.dtype).eps)).rsqrt()
    return x * scale if weight is None else x * scale * weight


def group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    with torch.no_grad():
        parts = x.reshape(x.shape[0], groups, -1)
        mean, scale = parts.mean(-1, keepdim=True), (parts.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        spread = lambda t: t.expand_as(parts).reshape(x.shape)  # noqa: E731
        mean, scale = spread(mean), spread(scale)
    y = (x - mean) * scale
    tail = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.reshape(tail)
    return y if bias is None else y + bias.reshape(tail)


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Any = None, bias: Any = None, *rest: Any, **options: Any
) -> Tensor:
    """Batch norm in eval mode, written out so that its running statistics have a gradient too."""
    eps = options.get("eps", rest[2] if len(rest) > 2 else 1e-5)
    tail = (1, -1) + (1,) * (x.ndim - 2)
    if mean is None:  # statistics of the batch, as weight standardisation takes them of a filter
        with torch.no_grad():
            dims = [d for d in range(x.ndim) if d != 1]
            mean, variance = x.mean(dims), x.var(dims, correction=0)
    y = (x - mean.reshape(tail)) * (variance.reshape(tail) + eps).rsqrt()
    y = y if weight is None else y * weight.reshape(tail)
    return y if bias is None else y + bias.reshape(tail)


NORMS: dict[Callable, Callable] = {F.layer_norm: layer_norm, F.rms_norm: rms_norm, F.group_norm: group_norm}
