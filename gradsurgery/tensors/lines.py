"""Lines of tensors along one dimension (rows of a matrix, columns of a matrix), and swaps of equally many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Span = tuple[int, int, int]
"""``(dimension, start, length)``: the part of a tensor that lines are counted in."""


@dataclass(frozen=True, eq=False)
class Lines:
    """Some lines of a named tensor.

    Attributes:
        name: The tensor's name.
        dim: Dimension that the lines are counted along.
        index: int64 ``[lines]``, in global indices.
        spans: What the other dimensions are cut to; dimensions that are not named are whole.
    """

    name: str
    dim: int
    index: np.ndarray
    spans: tuple[Span, ...] = ()

    @property
    def place(self) -> tuple[str, int, tuple[Span, ...]]:
        return self.name, self.dim, self.spans

    def cut(self, tensor: Tensor) -> Tensor:
        """The view of the tensor whose lines are meant."""
        for dim, start, length in self.spans:
            tensor = tensor.narrow(dim, start, length)
        return tensor


@dataclass(frozen=True, eq=False)
class LineSwap:
    """Line ``k`` of ``a`` and line ``k`` of ``b`` change places."""

    a: Lines
    b: Lines


@dataclass(frozen=True, eq=False)
class Board:
    """All lines that some swaps touch, tensor by tensor in ascending order, and where each line's value comes from.

    Attributes:
        parts: Lines by place, each sorted.
        source: int64 ``[lines]`` over the concatenated parts: line ``p`` receives what line ``source[p]`` holds.
    """

    parts: tuple[Lines, ...]
    source: np.ndarray

    @classmethod
    def of(cls, swaps: Sequence[LineSwap]) -> Board:
        found: dict[tuple[str, int, tuple[Span, ...]], list[np.ndarray]] = {}
        for swap in swaps:
            for end in (swap.a, swap.b):
                found.setdefault(end.place, []).append(end.index)
        parts, starts, total = [], {}, 0
        for place, indices in found.items():
            merged = np.sort(np.concatenate(indices))
            parts.append(Lines(place[0], place[1], merged, place[2]))
            starts[place] = (total, merged)
            total += merged.size
        source = np.arange(total)
        for swap in swaps:
            at = [
                start + np.searchsorted(merged, end.index)
                for end in (swap.a, swap.b)
                for start, merged in [starts[end.place]]
            ]
            source[at[0]], source[at[1]] = at[1], at[0]
        return cls(tuple(parts), source)
