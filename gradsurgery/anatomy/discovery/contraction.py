"""Which dimensions of an activation a call sums against which dimensions of a weight.

Every matrix product of torch is reduced to pairs ``(activation dim, weight dim)``: contracted ones and, for batched
products, shared ones. Both together are the *columns* of the weight: what reads one coordinate of the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Product:
    """One matrix product: argument positions of its operands, and how their dimensions meet."""

    left: int
    right: int
    contracted: Pairs
    shared: Pairs
    bias: int | None = None

    def flipped(self) -> Product:
        """The same product with the operands named the other way round."""
        turn = lambda pairs: [(b, a) for a, b in pairs]  # noqa: E731
        return Product(self.right, self.left, turn(self.contracted), turn(self.shared), self.bias)


def narrowed(view: Tensor, meet: Product) -> tuple[Tensor, Product]:
    """A weight without the dimensions it was expanded along: all examples share it."""
    for dim in reversed(range(view.ndim)):
        if view.stride(dim) == 0 and view.shape[dim] > 1:
            view = view.select(dim, 0)
            kept = lambda pairs, dim=dim: [(a, b - (b > dim)) for a, b in pairs if b != dim]  # noqa: E731
            meet = Product(meet.left, meet.right, kept(meet.contracted), kept(meet.shared), meet.bias)
    return view, meet


def _linear(x: Tensor, w: Tensor, *_: object) -> Product:
    return Product(0, 1, [(x.ndim - 1, w.ndim - 1)], [], 2)


def _matmul(x: Tensor, w: Tensor, *_: object, base: int = 0, bias: int | None = None) -> Product:
    xc, wc = x.ndim - 1, max(w.ndim - 2, 0)
    shared = []
    for back in range(3, min(x.ndim, w.ndim) + 1):
        if x.shape[-back] == w.shape[-back] and x.shape[-back] > 1:
            shared.append((x.ndim - back, w.ndim - back))
    return Product(base, base + 1, [(xc, wc)], shared, bias)


def _addmm(_: Tensor, x: Tensor, w: Tensor, *__: object) -> Product:
    return _matmul(x, w, base=1, bias=0)


def _conv(x: Tensor, w: Tensor, *_: object) -> Product:
    return Product(0, 1, [(x.ndim - (w.ndim - 1), 1)], [], 2)


def _conv_transpose(x: Tensor, w: Tensor, *_: object) -> Product:
    return Product(0, 1, [(x.ndim - (w.ndim - 1), 0)], [], 2)


def _einsum(equation: str, *operands: Tensor) -> Product | None:
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    if inputs.count(",") != 1:
        return None
    letters = []
    for term, operand in zip(inputs.split(","), operands, strict=True):
        spare = operand.ndim - len(term.replace("...", ""))
        letters.append(list(term.replace("...", "".join(chr(945 + i) for i in range(spare)))))
    left, right = letters
    kept = set(output.replace("...", "".join(chr(945 + i) for i in range(8)))) if output else set(left) ^ set(right)
    both = [letter for letter in left if letter in right]
    pair = lambda letter: (left.index(letter), right.index(letter))  # noqa: E731
    contracted = [pair(letter) for letter in both if letter not in kept]
    return Product(1, 2, contracted, [pair(letter) for letter in both if letter in kept])


def _inner(x: Tensor, w: Tensor) -> Product:
    return Product(0, 1, [(x.ndim - 1, w.ndim - 1)], [])


def _tensordot(x: Tensor, w: Tensor, dims: object = 2, *_: object) -> Product | None:
    if isinstance(dims, int):
        return Product(0, 1, [(x.ndim - dims + i, i) for i in range(dims)], [])
    if not isinstance(dims, (list, tuple)) or len(dims) != 2:
        return None
    left, right = ([d] if isinstance(d, int) else list(d) for d in dims)
    return Product(0, 1, [(a % x.ndim, b % w.ndim) for a, b in zip(left, right, strict=True)], [])


PRODUCTS: dict[Callable, Callable[..., Product | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _addmm,
    Tensor.baddbmm: _addmm,
    torch.einsum: _einsum,
    torch.inner: _inner,
    Tensor.inner: _inner,
    torch.tensordot: _tensordot,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.conv_transpose1d: _conv_transpose,
    F.conv_transpose2d: _conv_transpose,
}

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d)

_KEYWORDS = {"input": 0, "weight": 1, "bias": 2, "other": 1, "batch1": 1, "batch2": 2, "mat1": 1, "dims": 2}


def positional(args: tuple, kwargs: dict) -> tuple[list, dict]:
    """Arguments of a product with its operands in their places."""
    operands, rest = list(args), dict(kwargs)
    for keyword, place in _KEYWORDS.items():
        if keyword in rest and place == len(operands):
            operands.append(rest.pop(keyword))
    return operands, rest


def groups_of(func: Callable, args: list, kwargs: dict) -> int:
    """Number of groups of a convolution, 1 for everything else."""
    if func not in (F.conv1d, F.conv2d, F.conv3d):
        return 1
    return kwargs.get("groups", args[6] if len(args) > 6 else 1)
