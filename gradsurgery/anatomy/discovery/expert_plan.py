"""Experts of a real block after those of the twin: one template, repeated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gradsurgery.errors import AnatomyError

from .draft import Draft, Slot
from .names import Shapes, first_difference
from .patterns import classes_at, neuron_rows


def count_at(draft: Draft, small: Shapes, large: Shapes) -> int:
    """Units at real size of a group that has one line a unit somewhere, and all of that dimension.

    Raises:
        AnatomyError: No dimension says so, or two disagree.
    """
    sizes = set()
    for slot in draft.slots:
        for dim, rows in slot.index.items():
            if rows.shape[1] == 1 and len(np.unique(rows)) == draft.count == small[str(slot.name)][dim]:
                sizes.add(large[str(slot.name)][dim])
    if len(sizes) != 1:
        raise AnatomyError(f"{draft.block}: the number of {draft.kind}s at real size is ambiguous: {sorted(sizes)}")
    return sizes.pop()


def carried_experts(draft: Draft, small: Shapes, large: Shapes) -> Draft:
    """An expert group at real size."""
    if not isinstance(draft.slots[0].name, str):
        return _listed(draft, large)
    count = count_at(draft, small, large)
    slots = []
    for slot in draft.slots:
        index = {}
        for dim, rows in slot.index.items():
            real = large[str(slot.name)][dim]
            width = 1 if rows.shape[1] == 1 else real // count
            index[dim] = np.arange(count * width).reshape(count, width)
            full = rows.size == small[str(slot.name)][dim]
            if index[dim].size > real or full != (index[dim].size == real):
                raise AnatomyError(f"{slot.name}: {count} experts do not fit {real} entries")
        slots.append(replace(slot, index=index))
    return replace(draft, slots=tuple(slots), count=count, classes=classes_at(draft, count, None))


def _listed(draft: Draft, large: Shapes) -> Draft:
    """Experts that are elements of a list: the real list is as long as its names say."""
    names = draft.slots[0].name
    head = str(names[0])[: first_difference(str(names[0]), str(names[1]))].rstrip("0123456789")
    count = len({int(m.group(1)) for n in large if (m := re.match(re.escape(head) + r"(\d+)\.", n))})
    slots = []
    for slot in draft.slots:
        if isinstance(slot.name, str):
            slots.append(replace(slot, index={d: np.arange(count)[:, None] for d in slot.index}))
        else:
            tail = slot.name[0][len(head) + 1 :]
            slots.append(replace(slot, name=tuple(f"{head}{e}{tail}" for e in range(count))))
    return replace(draft, slots=tuple(slots), count=count, classes=classes_at(draft, count, None))


def carried_members(members: list[Draft], total: int, small: Shapes, large: Shapes) -> Iterator[Draft]:
    """Neurons of experts that share tensors: the first one's layout, shifted to every expert.

    Args:
        members: The twin's neuron groups, in the order of their experts.
        total: Experts at real size.
    """
    first, second = members[0], members[1]
    template: list[tuple[Slot, dict[int, np.ndarray], dict[int, int]]] = []
    counts = set()
    for a, b in zip(first.slots, second.slots, strict=True):
        index, steps = {}, {}
        for dim, rows in a.index.items():
            size, real = small[str(a.name)][dim], large[str(a.name)][dim]
            if rows.shape[1] == 1 and (rows == rows[:1]).all() and (b.index[dim] == rows + 1).all():
                index[dim], steps[dim] = np.zeros((1, 1), dtype=np.int64), 1  # the expert's own matrix
                continue
            flat = bool((b.index[dim] != rows).any())
            part, span = (size // len(members), real // total) if flat else (size, real)
            index[dim], steps[dim] = neuron_rows(rows, part, span, first.count), span if flat else 0
            counts.add(len(index[dim]))
        template.append((a, index, steps))
    if len(counts) != 1:
        raise AnatomyError(f"{first.block}: experts disagree about their width: {sorted(counts)}")
    count = counts.pop()
    for number in range(total):
        slots = tuple(
            replace(slot, index={d: _shifted(rows, number * steps[d], count) for d, rows in index.items()})
            for slot, index, steps in template
        )
        yield replace(first, slots=slots, count=count, expert=number, classes=(0,) * count)


def _shifted(rows: np.ndarray, by: int, count: int) -> np.ndarray:
    return np.broadcast_to(rows + by, (count, rows.shape[1])) if by or len(rows) < count else rows
