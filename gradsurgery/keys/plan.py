"""A key on a model: its swaps as lines of tensors, made once; and the region that it moves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from gradsurgery.anatomy import Anatomy, Region, Units
from gradsurgery.anatomy.entries import Entries, bits_of
from gradsurgery.anatomy.space import require_unpacked
from gradsurgery.errors import SelectionError
from gradsurgery.keys.lists import LISTS, Side, Swap, check_slots, check_swaps
from gradsurgery.keys.slots import Part, Place, SlotTable
from gradsurgery.tensors import Exchange, Lines, LineSwap

Lists = Mapping[str, tuple[Swap, ...]]
Ends = tuple[tuple[Place, np.ndarray], tuple[Place, np.ndarray]]


class KeyPlan:
    """What swapping by a key means in one model.

    Attributes:
        weights: Exchanges the parameters.
        buffers: Exchanges the buffers that belong to units (slopes), where each layer has its own.
        region: Every entry that moves: both ends of every swap.
        notes: What the swapped layers do differently, a sentence each.
    """

    def __init__(self, lists: Lists, anatomy: Anatomy) -> None:
        for name, swaps in lists.items():
            check_swaps(name, swaps)
        check_slots(dict(lists))
        self.anatomy = anatomy
        table = SlotTable.of(anatomy)
        self._pairs = [
            (LISTS[name].side, ends) for name, swaps in lists.items() for ends in _located(name, swaps, table)
        ]
        lines = merge([swap for side, ends in self._pairs for swap in line_swaps(side, ends, anatomy)])
        names = set(anatomy.space.shapes)
        self.weights = Exchange([swap for swap in lines if swap.a.name in names])
        self._parts: dict[frozenset[str], Exchange] = {}
        shared = shared_buffers(anatomy)
        self.buffers = Exchange([s for s in lines if s.a.name not in names and s.a.name not in shared])
        require_unpacked(anatomy.space, self.weights.names, "a permutation key")
        self.region = self._region()
        self._check_disjoint()
        self.notes = notes_of(self._pairs)

    def fits(self, base: nn.Module) -> bool:
        """Whether a model still has the tensors that the plan was made for (pruning changes them)."""
        shapes, now = self.anatomy.space.shapes, dict(base.named_parameters())
        return all(name in now and tuple(now[name].shape) == tuple(shapes[name]) for name in self.weights.names)

    def part(self, names: frozenset[str]) -> Exchange:
        """The exchange of some of the parameters alone."""
        if names not in self._parts:
            self._parts[names] = Exchange([s for s in self.weights.swaps if {s.a.name, s.b.name} <= names])
        return self._parts[names]

    def _region(self) -> Region:
        space, whole = self.anatomy.space, dict[int, int]()
        parts: dict[str, Entries] = {}
        for side, ends in self._pairs:
            if side == "whole":
                for place, slots in ends:
                    members = np.concatenate([place.units(int(slot)) for slot in slots])
                    whole[place.position] = whole.get(place.position, 0) | bits_of(members, len(place.group))
                continue
            for swap in line_swaps(side, ends, self.anatomy):
                for end in (swap.a, swap.b):
                    if end.name in space.shapes:
                        entries = entries_of(end, space.shapes[end.name])
                        parts[end.name] = parts[end.name] | entries if end.name in parts else entries
        units = Units(self.anatomy, whole)
        return units if not parts else units | Region(space, parts)

    def _check_disjoint(self) -> None:
        shapes = self.anatomy.space.shapes
        ends = [end for swap in self.weights.swaps for end in (swap.a, swap.b)]
        moved = sum(end.index.size * _line_size(end, shapes[end.name]) for end in ends)
        if moved != self.region.numel():
            raise SelectionError(
                "the key names parts of one unit twice (an expert and neurons inside it, or tensors that two units "
                "share), so that applying it twice would not lead back."
            )


def _located(name: str, swaps: Sequence[Swap], table: SlotTable) -> Iterator[Ends]:
    """The swaps of a list, gathered by the two places that they lie between.

    Raises:
        SelectionError: a slot that the model does not have, or slots of different shapes.
    """
    kind, side = LISTS[name].kind, LISTS[name].side
    found: dict[tuple[int, int], tuple[Place, Place, list[tuple[int, int]]]] = {}
    for k, (one, other) in enumerate(swaps):
        (a, i), (b, j) = (table.locate(kind, slot, f"{name}[{k}]") for slot in (one, other))
        if a.position > b.position:
            (a, i), (b, j) = (b, j), (a, i)
        found.setdefault((a.position, b.position), (a, b, []))[2].append((i, j))
    for a, b, slots in found.values():
        if a.shape(side) != b.shape(side):
            raise SelectionError(
                f"{name} swaps {a.group.name} with {b.group.name}, whose units have other shapes: "
                f"{_shapes(a, side)} and {_shapes(b, side)}."
            )
        both = np.asarray(slots)
        yield (a, both[:, 0]), (b, both[:, 1])


def _shapes(place: Place, side: Side) -> str:
    return ", ".join(str(list(shape)) for shape in place.shape(side)) or "nothing"


def line_swaps(side: Side, ends: Ends, anatomy: Anatomy) -> Iterator[LineSwap]:
    """The lines that change places, slice by slice."""
    (a, of_a), (b, of_b) = ends
    for parts in aligned(a.parts_on(side), b.parts_on(side)):
        every = np.arange(of_a.size)
        for k in [every] if all(map(_one_way, parts, (of_a, of_b))) else np.split(every, every.size):
            yield from _part_swaps(parts, (of_a[k], of_b[k]), anatomy)


def aligned(a: Sequence[Part], b: Sequence[Part]) -> list[tuple[Part, Part]]:
    """The parts of two places that correspond: by name where the names do, else by position."""
    there = {part.pattern: part for part in b}
    here = [part.pattern for part in a]
    if len(there) == len(b) and len(set(here)) == len(a) and set(here) == set(there):
        return [(part, there[part.pattern]) for part in a]
    return list(zip(a, b, strict=True))


def _one_way(part: Part, slots: np.ndarray) -> bool:
    """Whether slots are lines of one tensor: they differ in one dimension at most."""
    varying = [d for d, rows in part.footprint.index.items() if (rows[slots] != rows[slots[:1]]).any()]
    return isinstance(part.footprint.name, str) and len(varying) <= 1


def _part_swaps(parts: tuple[Part, Part], slots: tuple[np.ndarray, np.ndarray], anatomy: Anatomy) -> Iterator[LineSwap]:
    names, indices = [], []
    for part, chosen in zip(parts, slots, strict=True):
        name = part.footprint.name_of(int(chosen[0]))
        names.append(name if part.footprint.buffer else anatomy.space.canonical(name))
        indices.append({d: rows[chosen] for d, rows in part.footprint.index.items()})
    if not indices[0]:  # the unit owns the tensor whole
        whole = np.arange(anatomy.space.shapes[names[0]][0])[None]
        indices = [{0: whole}, {0: whole}]
    dim = max(indices[0], key=lambda d: max(np.unique(index[d]).size for index in indices))
    rest = [d for d in indices[0] if d != dim]
    for spans in _spans(rest, [{d: index[d][0] for d in rest} for index in indices]):
        ends = (Lines(n, dim, index[dim].reshape(-1), s) for n, index, s in zip(names, indices, spans, strict=True))
        yield LineSwap(*ends)


def _spans(
    dims: list[int], indices: list[dict[int, np.ndarray]]
) -> Iterator[tuple[tuple[tuple[int, int, int], ...], ...]]:
    """Runs of the other dimensions that are contiguous at both ends."""
    if not dims:
        yield (), ()
        return
    a, b = (index[dims[0]] for index in indices)
    cuts = np.flatnonzero((np.diff(a) != 1) | (np.diff(b) != 1)) + 1
    for run in np.split(np.arange(a.size), cuts):
        for rest in _spans(dims[1:], indices):
            first = ((dims[0], int(x[run[0]]), run.size) for x in (a, b))
            yield tuple((one, *more) for one, more in zip(first, rest, strict=True))


def merge(swaps: Sequence[LineSwap]) -> list[LineSwap]:
    """Swaps between the same two places in one."""
    found: dict[tuple[object, object], list[LineSwap]] = {}
    for swap in swaps:
        if swap.a.place > swap.b.place:
            swap = LineSwap(swap.b, swap.a)
        found.setdefault((swap.a.place, swap.b.place), []).append(swap)
    out = []
    for group in found.values():
        ends = [
            Lines(e[0].name, e[0].dim, np.concatenate([x.index for x in e]), e[0].spans)
            for e in ([s.a for s in group], [s.b for s in group])
        ]
        order = np.argsort(ends[0].index, kind="stable")  # in the order of memory
        out.append(LineSwap(*(Lines(e.name, e.dim, e.index[order], e.spans) for e in ends)))
    return out


def _line_size(lines: Lines, shape: tuple[int, ...]) -> int:
    lengths = {dim: length for dim, _, length in lines.spans}
    return int(np.prod([lengths.get(d, n) for d, n in enumerate(shape) if d != lines.dim], dtype=np.int64))


def entries_of(lines: Lines, shape: tuple[int, ...]) -> Entries:
    """The entries that lines are made of."""
    spans = {dim: np.arange(start, start + length) for dim, start, length in lines.spans}
    return Entries.box(shape, {**spans, lines.dim: lines.index})


def shared_buffers(anatomy: Anatomy) -> set[str]:
    """Buffers that units of several layers read, which no swap may touch."""
    layers: dict[str, set[int]] = {}
    for group in anatomy.groups:
        for footprint in group.footprints:
            if footprint.buffer:
                layers.setdefault(footprint.name_of(0), set()).add(group.layer)
    return {name for name, found in layers.items() if len(found) > 1}


def notes_of(pairs: Sequence[tuple[Side, Ends]]) -> tuple[str, ...]:
    """What the anatomy knows of swapped heads that work differently in their new place."""
    moved = [ends for side, ends in pairs if side == "whole" and ends[0][0].group.kind == "head" and not _alike(*ends)]
    groups = {place.group for ends in moved for place, _ in ends}
    sloped = sorted(g.name for g in groups if len(set(g.exchange_classes)) == len(g) > 1)
    if not sloped:
        return ()
    return (
        f"the heads of {sloped[0]} differ by position (ALiBi slopes or the like); where the model computes that, a "
        f"moved head works with the slope of its new place.",
    )


def _alike(one: tuple[Place, np.ndarray], other: tuple[Place, np.ndarray]) -> bool:
    """Heads that keep their number, in layers of one stack, have the same slopes there."""
    names = [re.sub(r"\d+", "#", place.group.name) for place, _ in (one, other)]
    return names[0] == names[1] and bool((one[1] == other[1]).all())
