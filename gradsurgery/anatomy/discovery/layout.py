"""The order in which units lie along one dimension of a tensor, and the same order at another size.

A dimension is cut into runs of consecutive positions that belong to one unit. Runs of one slot follow each other
(``q0 q1 k0 k1``), alternate by unit (``q0 k0 q1 k1``), or nest in groups (``q0 q1 k0 q2 q3 k1``); which of these it is
shows in the twin, and the same sorting lays out the real tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gradsurgery.errors import AnatomyError

Part = tuple[str, int]
"""What runs have in common: the family of units they belong to, and which run of the unit they are."""

_ORDERS: tuple[Callable[[int, int, int], tuple], ...] = (
    lambda part, group, unit: (part, group, unit),
    lambda part, group, unit: (group, part, unit),
    lambda part, group, unit: (group, unit, part),
)


@dataclass(frozen=True)
class Run:
    part: Part
    group: int
    unit: int
    length: int


def runs_of(size: int, owners: dict[str, np.ndarray], group_of: dict[str, np.ndarray]) -> list[Run]:
    """Cut a dimension into runs.

    Args:
        owners: ``family -> int [size]``, the unit at each position, -1 for none; the first family with a unit wins.
        group_of: ``family -> int [units]``, the group that each unit lies in.
    """
    label = np.full(size, -1)
    family = np.full(size, -1)
    names = list(owners)
    for number, name in reversed(list(enumerate(names))):
        held = owners[name] >= 0
        label[held], family[held] = owners[name][held], number
    cuts = np.flatnonzero((np.diff(label) != 0) | (np.diff(family) != 0)) + 1
    seen: dict[tuple[int, int], int] = {}
    runs = []
    for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
        number, unit = int(family[start]), int(label[start])
        place = seen.get((number, unit), 0)
        seen[number, unit] = place + 1
        name = names[number] if number >= 0 else ""
        group = int(group_of[name][unit]) if name in group_of else unit
        runs.append(Run((name, place), group, unit, stop - start))
    return runs


def lengths_of(runs: list[Run]) -> dict[Part, int]:
    """Length of the runs of each part, in order of first appearance.

    Raises:
        AnatomyError: Runs of one part differ.
    """
    lengths: dict[Part, int] = {}
    for run in runs:
        if lengths.setdefault(run.part, run.length) != run.length:
            raise AnatomyError("units of one group have runs of different lengths")
    return lengths


def starts_in(
    runs: list[Run], lengths: dict[Part, int], counts: dict[str, int], group_of: dict[str, np.ndarray]
) -> tuple[dict[Part, np.ndarray], int]:
    """Start of every run at real size, ``part -> int [units]``, and the size that all of them fill.

    Raises:
        AnatomyError: No order explains the twin, or several do and disagree.
    """
    parts = {part: i for i, part in enumerate(dict.fromkeys(run.part for run in runs))}
    if all(counts.get(name, 1) == len({r.unit for r in runs if r.part[0] == name}) for name, _ in parts):
        return _as_seen(runs, lengths)  # nothing but lengths changes
    answers = []
    for order in _ORDERS:
        keys = [order(parts[r.part], r.group, r.unit) for r in runs]
        if keys == sorted(keys):
            answers.append(_layout(order, parts, lengths, counts, group_of))
    if not answers:
        raise AnatomyError("units lie in an order that is neither concatenated, interleaved nor grouped")
    first, size = answers[0]
    for other, _ in answers[1:]:
        if any(not np.array_equal(first[p], other[p]) for p in parts):
            raise AnatomyError("the order of units in the twin has several readings at real size")
    return first, size


def _as_seen(runs: list[Run], lengths: dict[Part, int]) -> tuple[dict[Part, np.ndarray], int]:
    starts: dict[Part, dict[int, int]] = {}
    place = 0
    for run in runs:
        starts.setdefault(run.part, {})[run.unit] = place
        place += lengths[run.part]
    return {part: np.array([begin[u] for u in sorted(begin)]) for part, begin in starts.items()}, place


def _layout(
    order: Callable, parts: dict[Part, int], lengths: dict[Part, int], counts: dict[str, int], group_of: dict
) -> tuple[dict[Part, np.ndarray], int]:
    columns = []
    for part, number in parts.items():
        units = np.arange(counts.get(part[0], 1))
        groups = group_of.get(part[0], units)
        columns.append(np.stack([np.full_like(units, number), groups, units, np.full_like(units, lengths[part])]))
    table = np.concatenate(columns, axis=1)
    keys = np.stack(order(0, 1, 2))  # the order applied to row numbers gives the rows to sort by
    rank = np.lexsort(table[keys][::-1])
    sorted_lengths = table[3][rank]
    begin = np.empty(table.shape[1], dtype=np.int64)
    begin[rank] = np.cumsum(sorted_lengths) - sorted_lengths
    starts = {part: begin[table[0] == number] for part, number in parts.items()}
    return starts, int(sorted_lengths.sum())
