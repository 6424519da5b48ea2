"""Draws of tensors and of swaps between their lines, and the slow way to swap them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from gradsurgery.tensors import Lines, LineSwap

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn]


@dataclass
class Board:
    """Tensors, and swaps between lines of them."""

    tensors: dict[str, Tensor]
    swaps: list[LineSwap]

    def copy(self) -> dict[str, Tensor]:
        """The same values in tensors of the same strides."""
        out = {}
        for name, tensor in self.tensors.items():
            size = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            out[name] = torch.empty(size, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
            raw(out[name]).copy_(raw(tensor))
        return out


def raw(tensor: Tensor) -> Tensor:
    """Bits: what equality of floats does not see."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(sizes[tensor.dtype.itemsize])


def slow_(tensors: Mapping[str, Tensor], swaps: Sequence[LineSwap]) -> None:
    """Line by line."""
    for swap in swaps:
        for i, j in zip(swap.a.index.tolist(), swap.b.index.tolist(), strict=True):
            one = swap.a.cut(raw(tensors[swap.a.name])).select(swap.a.dim, i)
            other = swap.b.cut(raw(tensors[swap.b.name])).select(swap.b.dim, j)
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)


def values(shape: Sequence[int], dtype: torch.dtype, seed: int, order: Sequence[int] | None = None) -> Tensor:
    """Random bits (nans among them) in memory of any order of dimensions."""
    order = list(range(len(shape))) if order is None else list(order)
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize * int(np.prod(shape))
    stored = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype)
    stored = stored.reshape([shape[d] for d in order])
    return stored.permute([order.index(d) for d in range(len(shape))])


@st.composite
def boards(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = tuple(DTYPES), dims: int = 4, strided: bool = True
) -> Board:
    """Up to three tensors whose lines fit each other, and swaps that name no line twice."""
    dtype = draw(st.sampled_from(list(dtypes)))
    ndim = draw(st.integers(1, dims))
    dim = draw(st.integers(0, ndim - 1))
    cell = [draw(st.integers(1, 5 if ndim > 2 else 40)) for _ in range(ndim)]
    cut = [d != dim and draw(st.booleans()) for d in range(ndim)]
    tensors: dict[str, Tensor] = {}
    free: list[tuple[str, tuple[tuple[int, int, int], ...], int]] = []
    for k in range(draw(st.integers(1, 3))):
        name, shape = f"t{k}", [n + cut[d] * draw(st.integers(0, n + 2)) for d, n in enumerate(cell)]
        shape[dim] = draw(st.integers(2, 9))
        order = draw(st.permutations(range(ndim))) if draw(st.booleans()) else None
        tensors[name] = values(shape, dtype, draw(st.integers(0, 99)), order)
        starts = {d: draw(st.integers(0, shape[d] - cell[d])) for d in range(ndim) if cut[d]}
        places = [tuple((d, s, cell[d]) for d, s in starts.items())]
        for d in starts:  # a second part of the tensor, next to the first
            if starts[d] + 2 * cell[d] <= shape[d]:
                places.append(tuple((e, s + cell[e] * (e == d), cell[e]) for e, s in starts.items()))
                break
        free += [(name, spans, line) for spans in places for line in range(shape[dim])]
    free = draw(st.permutations(free))
    pairs = [(free[2 * k], free[2 * k + 1]) for k in range(draw(st.integers(1, len(free) // 2)))]
    gathered: dict[Any, list[tuple[int, int]]] = {}
    for one, other in pairs:
        gathered.setdefault((one[:2], other[:2]), []).append((one[2], other[2]))
    swaps = []
    for ((a, of_a), (b, of_b)), lines in gathered.items():
        both = np.asarray(lines)
        swaps.append(LineSwap(Lines(a, dim, both[:, 0], of_a), Lines(b, dim, both[:, 1], of_b)))
    return Board(tensors, swaps)
