"""Swaps of lines between tensors, in place and exactly, without a copy of any whole tensor.

Rows that lie contiguous in memory move in chunks, pair of tensors by pair. Columns of row-major matrices are gathered
block of rows by block of rows: each tensor is read once and in order, the values change places in a buffer that stays
in cache, and are written back in order, so that the cost does not depend on how many swaps cover the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsurgery.tensors.boxes import is_sharded
from gradsurgery.tensors.lines import Board, Lines, LineSwap
from gradsurgery.tensors.sharded import exchange_shards, shard_of

CHUNK = 1 << 20
"""Bytes of a buffer of rows."""
CACHE = {"cpu": 1 << 20}
"""Bytes of a buffer of columns; devices that are not named take `LARGE`."""
LARGE = 1 << 26
ROW = 32
"""Contiguous bytes from which a line counts as a row."""

Op = Callable[[Mapping[str, Tensor]], None]
Tensors = Mapping[str, Tensor]


class Exchange:
    """Swaps of lines, compiled once for tensors of one layout and run on any tensors of that layout.

    Applying an exchange twice restores every bit. Where it fails half-way, what was swapped is swapped back.

    Args:
        swaps: Which lines change places; no line twice.

    Example:
        >>> import numpy as np
        >>> from gradsurgery.tensors import Exchange, Lines, LineSwap
        >>> swap = LineSwap(Lines("a", 0, np.array([0])), Lines("b", 0, np.array([1])))
        >>> tensors = {"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}
        >>> Exchange([swap])(tensors)
        >>> tensors["a"].sum(1).tolist(), tensors["b"].sum(1).tolist()
        ([2.0, 0.0], [2.0, 0.0])
    """

    def __init__(self, swaps: Sequence[LineSwap]) -> None:
        self.swaps = tuple(swaps)
        self.names = tuple(dict.fromkeys(end.name for swap in self.swaps for end in (swap.a, swap.b)))
        self._programs: dict[tuple[Any, ...], list[Op]] = {}

    def __call__(self, tensors: Tensors) -> None:
        """Swap in place, under ``no_grad``; the tensors' version counters say so."""
        given = {name: bits(tensors[name]) for name in self.names}
        layout = tuple(_layout(tensor) for tensor in given.values())
        if layout not in self._programs:
            self._programs[layout] = compile_ops(self.swaps, given)
        done: list[Op] = []
        with torch.no_grad():
            try:
                for op in self._programs[layout]:
                    op(given)
                    done.append(op)
            except BaseException:
                for op in done:
                    op(given)  # every op is its own inverse
                raise


def bits(tensor: Tensor) -> Tensor:
    """The tensor outside of autograd; eight-bit floats as bytes, since few operations take them."""
    tensor = tensor.detach()
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point else tensor


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    shards = (tensor.placements, tensor.device_mesh) if is_sharded(tensor) else ()  # type: ignore[attr-defined]
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, shards


def compile_ops(swaps: Sequence[LineSwap], tensors: Tensors) -> list[Op]:
    """The operations that carry out swaps on tensors of this layout."""
    columns: dict[tuple[Any, ...], list[LineSwap]] = {}
    crossing: dict[tuple[Any, ...], list[LineSwap]] = {}
    ops: list[Op] = []
    for swap in swaps:
        ends = [shard_of(tensors[end.name], end) for end in (swap.a, swap.b)]
        if any(end.crosses for end in ends):
            crossing.setdefault(ends[0].kind, []).append(swap)
            continue
        if not all(end.here for end in ends):
            continue
        local = LineSwap(ends[0].lines, ends[1].lines)
        cuts = [end.lines.cut(end.local) for end in ends]
        folds = [(fold_of(cut, end.lines.dim), cut.dtype, cut.device) for cut, end in zip(cuts, ends, strict=True)]
        fold = folds[0][0]
        if folds[0] != folds[1] or fold is None or fold.inner * cuts[0].element_size() >= ROW:
            ops.append(lambda given, swap=local: swap_rows(given, swap))  # type: ignore[misc]
        else:
            columns.setdefault(folds[0], []).append(local)
    ops.extend(Columns(Board.of(group), key[0].inner) for key, group in columns.items())
    ops.extend(lambda given, g=group: exchange_shards(given, g, CHUNK * 32) for group in crossing.values())  # type: ignore[misc]
    return ops


def words(tensor: Tensor) -> Tensor:
    """Two-byte floats as integers: gathering them as floats changes nans, and is slower on a CPU."""
    return tensor.view(torch.int16) if tensor.dtype.itemsize == 2 and tensor.dtype.is_floating_point else tensor


def local_of(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Fold:
    """How a tensor reads as ``[outer, lines * inner]`` in the order of its memory.

    Attributes:
        before, after: Dimensions outside and inside of the lines', and their sizes.
        inner: Entries of a line next to each other.
    """

    before: tuple[tuple[int, int], ...]
    after: tuple[tuple[int, int], ...]
    inner: int


def fold_of(tensor: Tensor, dim: int) -> Fold | None:
    """None where a tensor has no such view: cut inside the lines, or outer dimensions that do not join."""
    order = _order(tensor)
    at = order.index(dim)
    before, after = (
        tuple((d, tensor.shape[d]) for d in dims if tensor.shape[d] > 1) for dims in (order[:at], order[at + 1 :])
    )
    try:
        folded(tensor, dim)
    except RuntimeError:
        return None
    return Fold(before, after, int(np.prod([n for _, n in after], dtype=np.int64)))


def folded(tensor: Tensor, dim: int) -> Tensor:
    """The view ``[outer, lines * inner]``; raises ``RuntimeError`` where there is none."""
    order = _order(tensor)
    outer = int(np.prod([tensor.shape[d] for d in order[: order.index(dim)]], dtype=np.int64))
    return tensor.permute(order).view(outer, tensor.numel() // max(outer, 1))


def _order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=lambda d: -tensor.stride()[d])


def swap_rows(tensors: Tensors, swap: LineSwap) -> None:
    """Chunk by chunk through two buffers."""
    a, b = (end.cut(local_of(tensors[end.name])) for end in (swap.a, swap.b))
    lines = swap.a.index.size
    bytes_a_line = max(a.numel() // max(a.shape[swap.a.dim], 1), 1) * a.element_size()
    step = max((CHUNK if a.device.type == "cpu" else LARGE) // bytes_a_line, 1)
    for start in range(0, lines, step):
        ia, ib = (_index(end.index[start : start + step], t.device) for end, t in ((swap.a, a), (swap.b, b)))
        of_a, of_b = a.index_select(swap.a.dim, ia), b.index_select(swap.b.dim, ib)
        try:
            a.index_copy_(swap.a.dim, ia, of_b.to(a.device))
            b.index_copy_(swap.b.dim, ib, of_a.to(b.device))
        except BaseException:
            a.index_copy_(swap.a.dim, ia, of_a)
            b.index_copy_(swap.b.dim, ib, of_b)
            _undo(tensors, swap, start)
            raise


def _undo(tensors: Tensors, swap: LineSwap, lines: int) -> None:
    if lines:
        done = (Lines(e.name, e.dim, e.index[:lines], e.spans) for e in (swap.a, swap.b))
        swap_rows(tensors, LineSwap(*done))


def _index(index: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).to(device)


class Columns:
    """Swap columns of row-major tensors: all tensors at once, block of rows by block of rows."""

    def __init__(self, board: Board, inner: int) -> None:
        self.board, self.inner = board, inner
        self._indices: dict[torch.device, tuple[list[Tensor], Tensor]] = {}

    def _on(self, device: torch.device, inner: int) -> tuple[list[Tensor], Tensor]:
        """Column numbers of each part, and the source of each column of the buffer; a line may be several entries."""
        if device not in self._indices:
            spread = np.arange(inner)
            flat = [(part.index[:, None] * inner + spread).reshape(-1) for part in self.board.parts]
            source = (self.board.source[:, None] * inner + spread).reshape(-1)
            self._indices[device] = [_index(f, device) for f in flat], _index(source, device)
        return self._indices[device]

    def __call__(self, tensors: Tensors) -> None:
        flat = [folded(part.cut(words(local_of(tensors[part.name]))), part.dim) for part in self.board.parts]
        outer, device, inner = flat[0].shape[0], flat[0].device, self.inner
        indices, source = self._on(device, inner)
        width = source.numel()
        rows = max(min(CACHE.get(device.type, LARGE) // (width * flat[0].element_size()), outer), 1)
        buffer = flat[0].new_empty(rows, width)
        for start in range(0, outer, rows):
            blocks = [x[start : start + rows] for x in flat]
            held = buffer[: blocks[0].shape[0]]
            parts = held.split([i.numel() for i in indices], dim=1)
            for block, index, part in zip(blocks, indices, parts, strict=True):
                torch.gather(block, 1, index.expand(held.shape[0], -1), out=part)
            moved = held.gather(1, source.expand(held.shape[0], -1))
            try:
                self._write(blocks, indices, moved)
            except BaseException:
                self._write(blocks, indices, held)
                for done in range(0, start, rows):
                    self._redo([x[done : done + rows] for x in flat], indices, source)
                raise

    def _redo(self, blocks: list[Tensor], indices: list[Tensor], source: Tensor) -> None:
        rows = blocks[0].shape[0]
        held = torch.cat([b.gather(1, i.expand(rows, -1)) for b, i in zip(blocks, indices, strict=True)], dim=1)
        self._write(blocks, indices, held.gather(1, source.expand(rows, -1)))

    @staticmethod
    def _write(blocks: list[Tensor], indices: list[Tensor], values: Tensor) -> None:
        parts = values.split([i.numel() for i in indices], dim=1)
        for block, index, part in zip(blocks, indices, parts, strict=True):
            block.scatter_(1, index.expand(block.shape[0], -1), part)
