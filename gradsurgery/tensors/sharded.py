"""Swaps of lines of sharded tensors: lines on one rank change places there, the others go where they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gradsurgery.errors import PlanError
from gradsurgery.tensors.boxes import is_sharded
from gradsurgery.tensors.lines import Lines, LineSwap


@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank holds of some lines.

    Attributes:
        local: The rank's own tensor.
        lines: The lines in local indices, where all ranks hold a part of every line (``crosses`` is False).
        here: Whether the rank holds any entry of them.
        crosses: The lines are dealt out over ranks: the sharded dimension is the one they are counted along, or one
            that they are cut to.
        kind: What swaps must have in common to be sent together.
    """

    local: Tensor
    lines: Lines
    here: bool = True
    crosses: bool = False
    kind: tuple[Any, ...] = ()


def shard_of(tensor: Tensor, lines: Lines) -> Shard:
    """How this rank's part of a tensor meets some lines.

    Raises:
        PlanError: a dimension that is sharded twice, or a tensor of partial sums.
    """
    if not is_sharded(tensor):
        return Shard(tensor, lines)
    placements = tensor.placements  # type: ignore[attr-defined]
    sharded = [p.dim for p in placements if p.is_shard()]
    if len(set(sharded)) < len(sharded) or any(
        p.is_partial() or type(p).__name__ == "_StridedShard" for p in placements
    ):
        raise PlanError(
            f"{lines.name} is laid out as {placements}, in which lines cannot be swapped; shard each dimension once "
            f"(fully_shard over one mesh dimension)."
        )
    local = tensor.to_local()  # type: ignore[attr-defined]
    if not (dealt := dealt_over(tensor, lines)):
        return Shard(local, lines, here=local.numel() > 0)
    return Shard(local, lines, crosses=True, kind=(tensor.device_mesh, tuple(dealt), tensor.dtype))  # type: ignore[attr-defined]


def exchange_shards(tensors: Mapping[str, Tensor], swaps: Sequence[LineSwap], chunk: int) -> None:
    """Swap lines that may lie on different ranks, ``chunk`` bytes at a time; every rank of the mesh takes part."""
    batch: list[LineSwap] = []
    room = chunk
    for swap in swaps:
        tensor = tensors[swap.a.name]
        line = max(tensor.numel() // max(tensor.shape[swap.a.dim], 1), 1) * tensor.element_size()
        step = max(chunk // line, 1)
        for start in range(0, swap.a.index.size, step):
            ends = [Lines(e.name, e.dim, e.index[start : start + step], e.spans) for e in (swap.a, swap.b)]
            room -= line * ends[0].index.size
            if batch and room < 0:
                _exchange(tensors, batch)
                batch, room = [], chunk - line * ends[0].index.size
            batch.append(LineSwap(*ends))
    _exchange(tensors, batch)


def _exchange(tensors: Mapping[str, Tensor], swaps: Sequence[LineSwap]) -> None:
    """Lines whose other end lies on another rank go there in one all-to-all; each rank gets as much as it gives."""
    crossings = [_Crossing(tensors, swap) for swap in swaps]
    group, ranks = crossings[0].group, crossings[0].ranks
    sent = [c.leaving() for c in crossings]
    sizes = [[part.numel() for part in parts] for parts in sent]
    send = torch.cat([parts[r].reshape(-1) for r in range(ranks) for parts in sent])
    counts = [sum(size[r] for size in sizes) for r in range(ranks)]
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, counts, counts, group=group)
    pieces = iter(received.split([size[r] for r in range(ranks) for size in sizes]))
    arrived: list[list[Tensor]] = [[] for _ in crossings]
    for _ in range(ranks):
        for parts in arrived:
            parts.append(next(pieces))
    for crossing, parts in zip(crossings, arrived, strict=True):
        crossing.arriving(torch.cat(parts))


class _Crossing:
    """One swap as this rank sees it: lines that stay change places here, the others in the order of their partner."""

    def __init__(self, tensors: Mapping[str, Tensor], swap: LineSwap) -> None:
        ends = (swap.a, swap.b)
        both = [tensors[end.name] for end in ends]
        dealt = [dealt_over(t, end) for t, end in zip(both, ends, strict=True)]
        if dealt[0] != dealt[1] or len(dealt[0]) != 1:
            names = " and ".join(end.name for end in ends)
            raise PlanError(f"{names} are dealt out over ranks differently, so that their lines cannot be swapped.")
        (over,) = dealt[0]
        mesh: Any = both[0].device_mesh  # type: ignore[attr-defined]
        self.group, self.ranks, me = mesh.get_group(over), mesh.size(over), mesh.get_local_rank(over)
        a, b = (_Dealt(t, end, over, self.ranks) for t, end in zip(both, ends, strict=True))
        stay = np.flatnonzero((a.owner == me) & (b.owner == me))
        of_a, of_b = a.take(stay), b.take(stay)
        a.put(stay, of_b)
        b.put(stay, of_a)
        self.sides = (a, b)
        self.lines = [np.flatnonzero((v.owner == me) & (w.owner != me)) for v, w in ((a, b), (b, a))]
        partner = np.concatenate([b.owner[self.lines[0]], a.owner[self.lines[1]]])
        self.order = np.lexsort((np.concatenate(self.lines), partner))
        self.counts = np.bincount(partner, minlength=self.ranks).tolist()

    def leaving(self) -> list[Tensor]:
        """By rank, the lines that it needs, ``[lines, …]``."""
        held = torch.cat([side.take(lines) for side, lines in zip(self.sides, self.lines, strict=True)])
        self.shape = held.shape
        return list(held[torch.from_numpy(self.order).to(held.device)].split(self.counts))

    def arriving(self, values: Tensor) -> None:
        """What the other ranks had for the lines that left, rank by rank."""
        back = torch.from_numpy(np.argsort(self.order)).to(values.device)
        parts = values.reshape(self.shape)[back].split([lines.size for lines in self.lines])
        for side, lines, part in zip(self.sides, self.lines, parts, strict=True):
            side.put(lines, part)


def dealt_over(tensor: Tensor, lines: Lines) -> list[int]:
    """The mesh dimensions over which lines are dealt out."""
    named = {lines.dim, *(dim for dim, _, _ in lines.spans)}
    return [m for m, p in enumerate(tensor.placements) if p.is_shard() and p.dim in named]  # type: ignore[attr-defined]


class _Dealt:
    """Lines of a tensor that are dealt out over the ranks of one mesh dimension in contiguous blocks."""

    def __init__(self, tensor: Tensor, lines: Lines, over: int, ranks: int) -> None:
        self.local, self.lines = tensor.to_local(), lines  # type: ignore[attr-defined]
        dim = tensor.placements[over].dim  # type: ignore[attr-defined]
        block = -(-tensor.shape[dim] // ranks)  # torch.chunk: every rank the same, the last ones less or nothing
        start = tensor.device_mesh.get_local_rank(over) * block  # type: ignore[attr-defined]
        self.spans = lines.spans
        if dim == lines.dim:
            self.owner, self.index = lines.index // block, lines.index - start
        else:
            first, length = next((s, n) for d, s, n in lines.spans if d == dim)
            if (first // block) != ((first + length - 1) // block):
                raise PlanError(f"a unit of {lines.name} lies on several ranks, so it cannot be swapped as one.")
            self.owner, self.index = np.full(lines.index.size, first // block), lines.index
            self.spans = tuple((d, s - start if d == dim else s, n) for d, s, n in lines.spans)

    def _view(self) -> Tensor:
        view = self.local
        for dim, start, length in self.spans:
            view = view.narrow(dim, start, length)
        return view.movedim(self.lines.dim, 0)

    def take(self, lines: np.ndarray) -> Tensor:
        """``[lines, …]``: copies of some of the lines, which this rank owns."""
        if not lines.size:
            shape = [n for d, n in enumerate(self._shape()) if d != self.lines.dim]
            return self.local.new_empty([0, *shape])
        return self._view().index_select(0, torch.from_numpy(self.index[lines]).to(self.local.device))

    def put(self, lines: np.ndarray, values: Tensor) -> None:
        if lines.size:
            self._view().index_copy_(0, torch.from_numpy(self.index[lines]).to(self.local.device), values)

    def _shape(self) -> list[int]:
        lengths = {dim: length for dim, _, length in self.spans}
        return [lengths.get(d, n) for d, n in enumerate(self.local.shape)]
