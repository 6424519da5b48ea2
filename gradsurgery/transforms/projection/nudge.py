"""Weights are stored with gaps: what rounding leaves of a removed direction goes by moving a few by whole gaps.

Each sampled entry can change ``<delta, r>`` by multiples of ``gap(p_i) * |r_i|``. Taken from the largest to the
smallest, they add up to what is to go, to half of the smallest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.tensors import gather, local_of, put_
from gradsurgery.transforms.projection.layout import Part
from gradsurgery.transforms.projection.measure import over_shards
from gradsurgery.transforms.projection.targets import Moved, flat_of

SAMPLE, LARGEST = 128, 2
"""Entries of each part that may move (of each row, half of them), and by how many gaps at most."""


def nudge_parts(
    moved: Moved, parts: Sequence[Part], vector: Mapping[str, Tensor], excess: Tensor, parameters: Mapping[str, Tensor]
) -> None:
    """Lower ``<delta, r>`` of numbered blocks by ``excess`` ``[blocks]``; ranks share it by what they can do."""
    sampled = {part: _sample(moved, part, vector.get(part.name)) for part in parts}

    def able(part: Part) -> Tensor:
        return torch.tensor([sum(float(q.abs().sum()) for _, _, q in sampled[part])], dtype=torch.float64)

    total = torch.zeros(len(excess), dtype=torch.float64)
    total.index_add_(0, torch.tensor([p.block for p in parts]), over_shards(parts, able, 1, parameters)[:, 0])
    mine = torch.zeros_like(total)
    for part in parts:
        mine[part.block] += able(part)[0]
    share = torch.where(total > 0, excess * mine / total.clamp(min=1e-300), 0.0)
    for block in {part.block for part in parts}:
        if not share[block]:
            continue
        members = [(part, k) for part in parts if part.block == block for k in range(len(sampled[part]))]
        steps = _greedy(torch.cat([sampled[p][k][2] for p, k in members]).tolist(), float(share[block]))
        ends = torch.tensor(steps, dtype=torch.float64).split([len(sampled[p][k][2]) for p, k in members])
        chosen = dict(zip(members, ends, strict=True))
        for part in {part: None for part, _ in members}:
            moved_pieces = [chosen[part, k] * sampled[part][k][1] for k in range(len(sampled[part]))]
            _move(moved, part, [at for at, _, _ in sampled[part]], moved_pieces)


def _sample(moved: Moved, part: Part, vector: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Places, gaps, and what a gap changes, by piece; the last two fp64 on the host."""
    out = []
    for now, r in zip(moved.pieces(part), flat_of(vector, part.boxes) or (), strict=False):
        assert isinstance(r, Tensor)
        at = torch.arange(0, r.numel(), max(r.numel() // (16 * SAMPLE), 1), device=r.device)
        at = at[r[at] != 0]
        at = at[torch.linspace(0, len(at) - 1, min(len(at), SAMPLE), device=r.device).long()]
        gap = gaps(now[at])
        out.append((at, gap.cpu(), (gap * r[at].double()).cpu()))
    return out


def gaps(weights: Tensor) -> Tensor:
    """Distance of stored weights to the next ones, fp64."""
    exponent = torch.frexp(weights.double().abs().clamp(min=torch.finfo(weights.dtype).tiny)).exponent
    return torch.ldexp(torch.full_like(exponent, torch.finfo(weights.dtype).eps, dtype=torch.float64), exponent - 1)


def _greedy(quanta: Sequence[float], excess: float) -> list[int]:
    """By how many gaps each entry moves so that the sum of what they change is ``-excess``."""
    steps = [0] * len(quanta)
    for k in sorted(range(len(quanta)), key=lambda k: -abs(quanta[k])):
        if quanta[k]:
            steps[k] = -max(min(round(excess / quanta[k]), LARGEST), -LARGEST)
            excess += steps[k] * quanta[k]
    return steps


def _move(moved: Moved, part: Part, places: Sequence[Tensor], changes: Sequence[Tensor]) -> None:
    tensor = moved.tensors[part.name]
    now = [local_of(tensor)] if part.boxes is None else gather(tensor, part.boxes)
    for piece, at, change in zip(now, places, changes, strict=True):
        flat = piece.view(-1)
        flat[at] = (flat[at].double() + change.to(flat.device)).to(flat.dtype)
    if part.boxes is not None:
        put_(tensor, part.boxes, now)


def nudge_rows(moved: Moved, part: Part, vector: Tensor | None, excess: Tensor, ranks: int) -> None:
    """The same for every row of a part: ``excess`` ``[rows]``, shared by ``ranks`` that hold a part of each row."""
    if vector is None or not bool(excess.any()):
        return
    now: Any = moved.rows(part)
    r = moved.matrix(vector, part)
    weights = now.after.flatten(1)
    step = max(weights.shape[1] // (SAMPLE // 2), 1)
    gap = gaps(weights[:, ::step])
    quanta = gap * r.flatten(1)[:, ::step].double()
    left = (excess / ranks).to(quanta.device)
    order = quanta.abs().argsort(1, descending=True)
    steps = torch.zeros_like(quanta)
    for column in range(order.shape[1]):
        at = order[:, column : column + 1]
        q = quanta.gather(1, at)[:, 0]
        k = torch.where(q != 0, -(left / torch.where(q != 0, q, 1.0)).round().clamp(-LARGEST, LARGEST), 0.0)
        left = left + k * q
        steps.scatter_(1, at, k[:, None])
    change = torch.zeros(weights.shape, dtype=torch.float64, device=weights.device)
    change[:, ::step] = steps * gap
    moved.add_(part, change.view(now.after.shape))
