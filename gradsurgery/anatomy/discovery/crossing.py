"""Weights that read and write the same columns: block-diagonal gates, grouped convolutions, products inside a unit.

Such a tensor is a producer and a consumer of one group. Where what a unit writes and what another one reads meet in
one entry, the two are one unit (the gates of a block); where every unit meets every other (a square mixing matrix),
no units can hold it.
"""

from __future__ import annotations

import numpy as np

from .coordinates import Index
from .draft import Slot


def owners(index: Index, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Which unit holds each entry of a tensor, -1 for none."""
    held = np.full(shape, -1)
    for unit in range(count):
        held[np.ix_(*(index[d][unit] if d in index else np.arange(n) for d, n in enumerate(shape)))] = unit
    return held


def met(slots: list[Slot], shapes: dict[str, tuple[int, ...]], count: int) -> np.ndarray:
    """Label per unit; units whose slots meet in an entry of one tensor share it."""
    labels = np.arange(count)
    for name, (one, other) in twice(slots).items():
        a, b = (owners(slot.index, shapes[name], count) for slot in (one, other))
        both = (a >= 0) & (b >= 0) & (a != b)
        for first, second in np.unique(np.stack([a[both], b[both]], axis=1), axis=0):
            labels[labels == labels[second]] = labels[first]
    return np.unique(labels, return_inverse=True)[1]


def twice(slots: list[Slot]) -> dict[str, tuple[Slot, Slot]]:
    """Tensors that two slots name."""
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        found.setdefault(str(slot.name), []).append(slot)
    return {name: (pair[0], pair[1]) for name, pair in found.items() if len(pair) == 2}


def merged(slots: list[Slot], shapes: dict[str, tuple[int, ...]], count: int) -> list[Slot]:
    """One slot a tensor, where both of its slots together are a product of coordinates; others stay as they are."""
    pairs = twice(slots)
    kept = []
    for slot in slots:
        pair = pairs.get(str(slot.name))
        union = _union(*pair, shapes[str(slot.name)], count) if pair else None
        if union is None:
            kept.append(slot)
        elif slot is pair[0]:  # type: ignore[index]
            kept.append(Slot(slot.name, union))
    return kept


def _union(one: Slot, other: Slot, shape: tuple[int, ...], count: int) -> Index | None:
    index: Index = {}
    for dim, size in enumerate(shape):
        rows = [
            sorted({v for s in (one, other) for v in (s.index[dim][unit].tolist() if dim in s.index else range(size))})
            for unit in range(count)
        ]
        if len({len(r) for r in rows}) != 1:
            return None
        if len(rows[0]) < size:
            index[dim] = np.array(rows, dtype=np.int64)
    box = np.prod([index[d].shape[1] if d in index else n for d, n in enumerate(shape)])
    a, b = owners(one.index, shape, count), owners(other.index, shape, count)
    whole = all(int(((a == u) | (b == u)).sum()) == box for u in range(count))
    return index if whole else None
