"""Record who reads what: one forward in which every matrix product is noted and made a barrier.

The barrier is the idea everything else rests on. Each product reads a *detached* activation, so the gradient of the
activation (kept before the cut) reaches only the parameters between the previous products and this one: the rows that
write a column, and the biases, norms, sinks and slopes on the way. Norms are straight-through (see ``straight``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .composite import COMPOSITE, folded, seen_through, written_out
from .contraction import CONVOLUTIONS, PRODUCTS, Product, groups_of, narrowed, positional
from .node import Node, Read
from .replica import learned
from .straight import CLIPPED, NORMS, ONE_SIDED, SATURATING, SOFTMAX, STATISTICS, faint, is_statistic, leak
from .updates import Updates
from .wide import EXPONENTIALS, Wide, widened

_TIMES = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply, Tensor.mul_)
_LOOKUPS = (
    *(Tensor.__getitem__, torch.index_select, Tensor.index_select, torch.gather, Tensor.gather, F.embedding),
    F.interpolate,  # positions, for pictures of another size
)
_SIDE_BY_SIDE = (torch.cat, torch.concat, torch.stack)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)


DISGUISED = "multiplied and summed by hand"


class Trace(Wide):
    """Note every product of an activation with a learned tensor, and cut the gradient there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(scatter=True)
        self.tensors = {name: tensor for name, tensor, _ in learned(model)}
        self.owners = {t.untyped_storage().data_ptr(): name for name, t in reversed(self.tensors.items()) if t.numel()}
        self.nodes: dict[tuple, Node] = {}
        self.embedded: set[str] = set()
        self.uses: dict[str, set[str]] = defaultdict(set)
        self.shifts: dict[str, list[str]] = {}
        self.derived: dict[int, Tensor] = {}
        self.results: dict[int, tuple[Tensor, Read]] = {}
        self.updates = Updates(lambda tensor: self.owner(tensor) is not None)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        func, args, kwargs = widened(func, args, kwargs or {})
        result = self.updates.unfold(self.call, func, args, kwargs)
        if result is None:
            result = self.call(func, args, kwargs)
            self.updates.note(func, args, kwargs, result)
        return result

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in COMPOSITE:
            with seen_through(self):
                return func(*args, **kwargs)
        if func is torch.einsum and len(args) > 3 and "->" in args[0] and "." not in args[0]:
            return folded(self.call, args[0], args[1:])
        if func is F.scaled_dot_product_attention and any(self.owner(x) for x in args[:3]):
            return written_out(self.call, *args, **kwargs)
        if func in PRODUCTS:
            args, kwargs, read = self.product(func, *positional(args, kwargs))
            result = func(*args, **kwargs)
            if read is not None:
                self.results[id(result)] = result, read
            return result
        self.use(func, args)
        if func is F.embedding:
            self.embedded.add(self.owner(args[1] if len(args) > 1 else kwargs["weight"]) or "")
        result = self.straight(func, args, kwargs)
        self.derive(args, result)
        return result

    def straight(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of a call that is no product, norms and clipped functions with a straight-through gradient."""
        if func in NORMS or func is F.batch_norm:
            self.shift(func, args)
        if func in NORMS:
            return NORMS[func](*args, **kwargs)
        if func is F.batch_norm:
            return super().call(func, args, kwargs)
        if func in CLIPPED:
            return F.leaky_relu(args[0], 0.3)
        if func in EXPONENTIALS and args[0].is_floating_point():
            return super().call(func, args, kwargs) + faint(args[0])
        if func in SOFTMAX:
            return super().call(func, args, kwargs)
        result = func(*self.chosen(func, args), **kwargs)
        if func in ONE_SIDED:
            return result + 0.1 * args[0]
        if func in SATURATING:
            return result + 0.1 * leak(args[0])
        return result.detach() if func in STATISTICS and is_statistic(func, args, result) else result

    def shift(self, func: Callable, args: tuple) -> None:
        """Note what a norm adds or subtracts channel by channel, beside the gain that it multiplies by."""
        gain, *others = (3, 1, 4) if func is F.batch_norm else (2, 3)
        names = [self.owner(args[place]) if place < len(args) else None for place in (gain, *others)]
        if names[0] is not None:
            self.shifts[names[0]] = [name for name in names[1:] if name is not None]

    def derive(self, args: tuple, result: Any) -> None:
        """Note a weight that is computed from a parameter entry by entry: standardised, normalised, scaled."""
        if not args or not isinstance(result, Tensor) or self.owner(result) is not None or not result.is_contiguous():
            return
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.requires_grad]
        names = [self.owner(a) for a in tensors]
        for source, name in zip(tensors, names, strict=True):
            if name is None or None in names or source.shape != result.shape or not source.is_contiguous():
                continue
            parameter = self.tensors[name]
            if parameter.ndim > 1 and parameter.numel() == result.numel():
                place = result.untyped_storage().data_ptr()
                self.owners[place], self.derived[place] = name, result.detach().view(parameter.shape)

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
        if groups > 1 and args[1].shape[1] == 1:
            self.uses[self.owner(args[1]) or ""].add("depthwise")
        if meet is None or (groups > 1 and args[1].shape[1] == 1):
            return tuple(args), kwargs, None
        if self.owner(args[meet.right]) is None:
            meet = meet.flipped()
        name, x, view = self.owner(args[meet.right]), args[meet.left], args[meet.right]
        if name is None or self.owner(x) is not None:
            return tuple(args), kwargs, None
        view, meet = narrowed(view, meet)
        pairs = meet.shared + meet.contracted
        node = self.node(x, tuple(a for a, _ in pairs))
        node.shared = int(np.prod([x.shape[a] for a, _ in meet.shared])) if meet.shared else 0
        parameter = self.derived.get(view.untyped_storage().data_ptr(), self.tensors[name])
        read = Read(name, view.detach(), parameter, tuple(b for _, b in pairs), groups, filters=func in CONVOLUTIONS)
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

    def use(self, func: Callable, args: tuple) -> None:
        """Note what is done with a learned tensor besides products: nothing that reads an activation's columns."""
        if func in _SUMS:
            self.sum(args)
            kind = "added"
        elif func in _TIMES:
            kind = "scaled"
        elif func in _LOOKUPS:
            kind = "looked up"
        elif func in _SIDE_BY_SIDE and args:
            kind, args = "added", tuple(args[0])
        else:
            return
        for place, tensor in enumerate(args[:2] if func not in _SIDE_BY_SIDE else args):
            name = self.owner(tensor)
            if name is not None:
                spread = kind == "scaled" and self.spreads(args[1 - place], tensor)
                self.uses[name].add(DISGUISED if spread else kind)

    def spreads(self, x: object, w: Tensor) -> bool:
        """Whether a matrix is multiplied with a spread-out activation: a product in disguise."""
        if not isinstance(x, Tensor) or self.owner(x) is not None:
            return False
        shape = (1,) * (w.ndim - x.ndim) + tuple(x.shape)
        pairs = [(a, b) for a, b in zip(shape[len(shape) - w.ndim :], w.shape, strict=True) if b > 1]
        return any(a == 1 for a, _ in pairs) and any(a > 1 for a, _ in pairs)

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
