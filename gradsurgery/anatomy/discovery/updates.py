"""Weights with a low-rank update that is added before they are used: read like an adapter beside its layer.

    x (W + s B A)^T = x W^T + s (x A^T) B^T

The right-hand side is what a LoRA layer computes, and what a trace understands: the ranks become an activation. PEFT
adds the product up first where it adapts whole parameters (``target_parameters``), such as the experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Term = tuple[Tensor, Tensor, float]
"""``s * left @ right``, batched like the weight."""


@dataclass(frozen=True)
class Update:
    """``base + sum of terms`` as one tensor, which is kept so that its id stays its own."""

    tensor: Tensor
    base: Tensor | None
    terms: tuple[Term, ...]

    def of(self, tensor: Tensor, change: Callable[[Tensor], Tensor], turned: bool = False) -> Update:
        """The same of a view of the weight; ``turned`` where the view transposes it."""
        terms = [(change(left), change(right), s) for left, right, s in self.terms]
        if turned:
            terms = [(right, left, s) for left, right, s in terms]
        return Update(tensor, change(self.base) if self.base is not None else None, tuple(terms))


_ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_MUL = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_SAME = (Tensor.to, Tensor.contiguous, Tensor.double, Tensor.type_as)
_TURN = (torch.transpose, Tensor.transpose, torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)


class Updates:
    """The updated weights of one forward.

    Args:
        is_learned: Whether a tensor is a view of a parameter.
    """

    def __init__(self, is_learned: Callable[[Any], bool]) -> None:
        self.is_learned = is_learned
        self.known: dict[int, Update] = {}

    def unfold(self, call: Callable, func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
        """A product of an activation with an updated weight, as products of ``call``; ``None`` for any other call."""
        weight = self.known.get(id(args[1])) if len(args) > 1 else None
        if weight is None or weight.base is None or not (func is F.linear or func in _MATMUL):
            return None
        x, _, *rest = args
        out = call(func, (x, weight.base, *rest), kwargs)
        for left, right, scale in weight.terms:
            first, second = (right, left) if func is F.linear else (left, right)
            out = out + scale * call(func, (call(func, (x, first), {}), second), {})
        return out

    def note(self, func: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Remember a result that is an updated weight, a part of one, or an update alone."""
        if isinstance(result, Tensor) and id(result) not in self.known:
            made = self._made(func, args, kwargs, result)
            if made is not None:
                self.known[id(result)] = made

    def _made(self, func: Callable, args: tuple, kwargs: dict, result: Tensor) -> Update | None:
        if func in (torch.baddbmm, torch.addmm) and kwargs.get("beta", 1) == 1 and all(map(self.is_learned, args[:3])):
            return Update(result, args[0], ((args[1], args[2], kwargs.get("alpha", 1.0)),))
        if func is torch.einsum and len(args) == 3 and all(map(self.is_learned, args[1:])):
            return _product(args[0], args[1], args[2], result)
        if func in _MATMUL and all(map(self.is_learned, args[:2])):
            return Update(result, None, ((args[0], args[1], 1.0),))
        source = self.known.get(id(args[0])) if args else None
        if func in _ADD and len(args) == 2:
            return self._sum(args, result)
        if source is None:
            return None
        if func in _SAME:
            return replace(source, tensor=result)
        if func in _MUL and isinstance(args[1], (int, float)) and source.base is None:
            return Update(result, None, tuple((left, right, s * args[1]) for left, right, s in source.terms))
        if func is Tensor.__getitem__ and result.ndim == source.tensor.ndim - 1 == 2:
            return source.of(result, lambda t: t[args[1]])
        if func in _TURN and result.shape == source.tensor.mT.shape:
            return source.of(result, lambda t: t.transpose(-1, -2), turned=True)
        return None

    def _sum(self, args: Iterable[Any], result: Tensor) -> Update | None:
        base, terms = None, list[Term]()
        for part in args:
            known = self.known.get(id(part))
            terms += known.terms if known is not None else ()
            own = known.base if known is not None else part if self.is_learned(part) else None
            if (known is None and own is None) or (own is not None and base is not None):
                return None
            base = own if own is not None else base
        return Update(result, base, tuple(terms)) if terms else None


def _product(equation: str, one: Tensor, other: Tensor, result: Tensor) -> Update | None:
    """A low-rank product as ``left @ right``, from an einsum over one letter."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    inner = [letter for letter in first if letter in second and letter not in output]
    if len(inner) != 1 or len(output) < 2 or output[-2] in "".join(set(first) & set(second)):
        return None
    if output[-2] not in first:
        first, second, one, other = second, first, other, one
    batch, rows, columns = output[:-2], output[-2], output[-1]
    if sorted(first) != sorted(batch + rows + inner[0]) or sorted(second) != sorted(batch + inner[0] + columns):
        return None
    left = one.permute([first.index(letter) for letter in batch + rows + inner[0]])
    right = other.permute([second.index(letter) for letter in batch + inner[0] + columns])
    return Update(result, None, ((left, right, 1.0),))
