"""Record who reads what: one forward in which every matrix product is noted and made a barrier.

The barrier is the idea everything else rests on. Each product reads a *detached* activation, so the gradient of the
activation (kept before the cut) reaches only the parameters between the previous products and this one: the rows that
write a column, and the biases, norms, sinks and slopes on the way. Norms are straight-through (their statistics are
detached), or they would couple everything. Casts to 32 bits are widened to 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .contraction import PRODUCTS, Product, groups_of, positional
from .coordinates import Index, lines_of
from .replica import learned

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_POWERS = (torch.pow, Tensor.pow, Tensor.__pow__)
_STATISTICS = (
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
    torch.mean,
    Tensor.mean,
    *_POWERS,
)

_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
_CHOICES = (torch.topk, Tensor.topk, torch.argmax, Tensor.argmax)
_CLIPPED = (F.relu, torch.relu, Tensor.relu, F.relu6, F.hardtanh)
"""Their gradient is zero where they clip, and a unit that clips on every token would go unseen."""


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


@dataclass
class Read:
    """A parameter view that reads an activation: ``index`` says which of its entries belong to each column."""

    name: str
    view: Tensor
    parameter: Tensor
    column_dims: tuple[int, ...]
    groups: int = 1
    bias: str | None = None
    bias_view: Tensor | None = None
    _index: Index | None = None

    @property
    def index(self) -> Index:
        if self._index is None:
            if self.groups > 1:
                self._index = _grouped(self.view, self.groups)
            else:
                self._index = lines_of(self.view, self.parameter, self.column_dims) or {}
        return self._index


@dataclass
class Node:
    """An activation that at least one weight reads, with the dimensions that are summed away (its columns)."""

    tensor: Tensor
    dims: tuple[int, ...]
    reads: list[Read] = field(default_factory=list)
    shared: int = 0
    """How many matrices a batched product reads the activation with, 0 for a plain one."""

    @property
    def columns(self) -> int:
        return int(np.prod([self.tensor.shape[d] for d in self.dims]))

    def column_ids(self) -> Tensor:
        """Column number of every entry, broadcastable to the activation."""
        sizes = [self.tensor.shape[d] for d in self.dims]
        ids = torch.arange(self.columns).reshape(sizes)
        order = sorted(range(len(self.dims)), key=lambda i: self.dims[i])
        shape = [n if d in self.dims else 1 for d, n in enumerate(self.tensor.shape)]
        return ids.permute(order).reshape(shape)


class Trace(Wide):
    """Note every product of an activation with a learned tensor, and cut the gradient there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(scatter=True)
        self.tensors = {name: tensor for name, tensor, _ in learned(model)}
        self.owners = {t.untyped_storage().data_ptr(): name for name, t in reversed(self.tensors.items()) if t.numel()}
        self.nodes: dict[tuple, Node] = {}
        self.embedded: set[str] = set()
        self.results: dict[int, tuple[Tensor, Read]] = {}

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in PRODUCTS:
            args, kwargs, read = self.product(func, *positional(args, kwargs))
            result = func(*args, **kwargs)
            if read is not None:
                self.results[id(result)] = result, read
            return result
        if func in _SUMS:
            self.sum(args)
        if func is F.embedding:
            self.embedded.add(self.owner(args[1] if len(args) > 1 else kwargs["weight"]) or "")
        elif func is F.layer_norm:
            return layer_norm(*args, **kwargs)
        elif func is F.rms_norm:
            return rms_norm(*args, **kwargs)
        elif func is F.group_norm:
            return group_norm(*args, **kwargs)
        elif func in _CLIPPED:
            return F.leaky_relu(args[0], 0.3)
        result = func(*self.chosen(func, args), **kwargs)
        if func in _STATISTICS and is_statistic(func, args, result):
            result = result.detach()
        return result

    def owner(self, tensor: object) -> str | None:
        """Name of the learned tensor that ``tensor`` is a view of."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return None
        return self.owners.get(tensor.untyped_storage().data_ptr())

    def product(self, func: Callable, args: list, kwargs: dict) -> tuple[tuple, dict, Read | None]:
        operands = args[0] if func is torch.einsum and len(args) == 2 and isinstance(args[1], (list, tuple)) else None
        if operands is not None:
            args = [args[0], *args[1]]
        try:
            meet: Product | None = PRODUCTS[func](*args)
        except TypeError:  # operands by unusual keywords
            return tuple(args), kwargs, None
        groups = groups_of(func, args, kwargs)
        if meet is None or (groups > 1 and args[1].shape[1] == 1):
            return tuple(args), kwargs, None
        if self.owner(args[meet.right]) is None:
            meet = meet.flipped()
        name, x, view = self.owner(args[meet.right]), args[meet.left], args[meet.right]
        if name is None or self.owner(x) is not None or not x.requires_grad:
            return tuple(args), kwargs, None
        pairs = meet.shared + meet.contracted
        node = self.node(x, tuple(a for a, _ in pairs))
        node.shared = int(np.prod([x.shape[a] for a, _ in meet.shared])) if meet.shared else 0
        read = Read(name, view.detach(), self.tensors[name], tuple(b for _, b in pairs), groups)
        if meet.bias is not None and meet.bias < len(args) and self.owner(args[meet.bias]):
            read.bias, read.bias_view = self.owner(args[meet.bias]), args[meet.bias].detach()
        node.reads.append(read)
        args[meet.left] = x.detach()
        return tuple(args), kwargs, read

    def sum(self, args: tuple) -> None:
        """Note a bias that is added after its product instead of in it."""
        for x, bias in (args[:2], args[1::-1]):
            _, read = self.results.get(id(x), (None, None))
            if read is not None and isinstance(bias, Tensor) and bias.ndim == 1 and self.owner(bias):
                read.bias, read.bias_view = self.owner(bias), bias.detach()

    def unread(self) -> int:
        """How many entries of weights no activation has met yet, for instance experts that no token chose."""
        met: dict[str, set] = {}
        for node in self.nodes.values():
            for read in node.reads:
                met.setdefault(read.name, set()).add((read.view.storage_offset(), tuple(read.view.shape)))
        sizes = {name: sum(int(np.prod(shape)) for _, shape in views) for name, views in met.items()}
        matrices = {n: t.numel() for n, t in self.tensors.items() if t.ndim > 1 and n not in self.embedded}
        return sum(max(0, size - sizes.get(name, 0)) for name, size in matrices.items())

    def stacked(self) -> bool:
        """Whether some weights hold many matrices: experts, who want more tokens."""
        return any(read.parameter.ndim > 2 and read.view.ndim < 4 for n in self.nodes.values() for read in n.reads)

    def node(self, x: Tensor, dims: tuple[int, ...]) -> Node:
        key = (x.data_ptr(), tuple(x.shape), x.stride(), dims)
        return self.nodes.setdefault(key, Node(x, dims))


def cotangent(tensor: Tensor, seed: int = 7) -> Tensor:
    """A fixed random direction of the shape of ``tensor``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def is_statistic(func: Callable, args: tuple, result: Any) -> bool:
    """A number per token that a norm divides by or subtracts, not a feature."""
    if not isinstance(result, Tensor) or not isinstance(args[0], Tensor) or result.ndim == 0:
        return False
    if func in _POWERS and not (isinstance(args[1], float) and abs(args[1]) == 0.5):
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


def _grouped(view: Tensor, groups: int) -> Index:
    """Columns of a grouped convolution: channel ``c`` is read by the filters of its own group only."""
    filters, inner = view.shape[0] // groups, view.shape[1]
    group = np.repeat(np.arange(groups), inner)
    return {0: group[:, None] * filters + np.arange(filters)[None], 1: np.tile(np.arange(inner), groups)[:, None]}
