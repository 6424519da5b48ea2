"""Where the slots of a key lie in a model: ``(layer, index)`` -> a unit, and the tensor slices it is made of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from gradsurgery.anatomy import Anatomy
from gradsurgery.anatomy.groups import Footprint, UnitGroup
from gradsurgery.errors import SelectionError
from gradsurgery.keys.lists import Side, Slot

NAMES = {"head": "heads", "neuron": "neurons", "expert": "experts"}


@dataclass(frozen=True, eq=False)
class Part:
    """Slice ``k`` of every slot of a place.

    Attributes:
        footprint: Names and indices, one row a slot.
        consumer: It reads the unit's activations.
        pattern: The tensor's name with its numbers left out, to find the same part in another layer.
    """

    footprint: Footprint
    consumer: bool

    @property
    def pattern(self) -> str:
        return re.sub(r"\d+", "#", self.footprint.name_of(0))


class Place:
    """A group of units as keys count them: heads that share keys and values count by KV group, with all their heads."""

    def __init__(self, anatomy: Anatomy, position: int) -> None:
        self.anatomy, self.position = anatomy, position
        self.group: UnitGroup = anatomy.groups[position]
        self.parent = anatomy.parent_of(self.group) if self.group.parent is not None else None

    def __len__(self) -> int:
        return len(self.parent if self.parent is not None else self.group)

    def units(self, index: int) -> np.ndarray:
        """The group's units that make up a slot."""
        return np.array([index]) if self.parent is None else self._members[index]

    @cached_property
    def _members(self) -> list[np.ndarray]:
        parents = np.asarray(self.group.parent_units)
        return [np.flatnonzero(parents == k) for k in range(len(self))]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        whole = self.parent if self.parent is not None else self.group
        return tuple(Part(f, k in whole.consumer_slots) for k, f in enumerate(whole.footprints))

    def parts_on(self, side: Side) -> tuple[Part, ...]:
        if side == "whole":
            return self.parts
        return tuple(part for part in self.parts if part.consumer == (side == "consumers"))

    def shape(self, side: Side) -> tuple[tuple[int, ...], ...]:
        """The shape of each slice of a slot: what two slots must have in common to change places."""
        shapes = self.anatomy.space.shapes
        out = []
        for part in self.parts_on(side):
            if not part.footprint.buffer:
                whole = shapes[self.anatomy.space.canonical(part.footprint.name_of(0))]
                index = part.footprint.index
                out.append(tuple(index[d].shape[1] if d in index else n for d, n in enumerate(whole)))
        return tuple(out)

    def size(self, side: Side) -> int:
        """Parameter entries of one slot."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shape(side))


class SlotTable:
    """All places of a model that keys can speak of."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.places: dict[tuple[str, int], list[Place]] = {}
        for position, group in enumerate(anatomy.groups):
            if group.kind in NAMES:
                self.places.setdefault((group.kind, group.layer), []).append(Place(anatomy, position))

    @classmethod
    def of(cls, anatomy: Anatomy) -> SlotTable:
        return _table(anatomy)

    def layers(self, kind: str) -> Mapping[int, list[Place]]:
        return {layer: places for (k, layer), places in self.places.items() if k == kind}

    def locate(self, kind: str, slot: Slot, what: str) -> tuple[Place, int]:
        """The place of a slot, and its index there.

        Raises:
            SelectionError: the model has no such layer or unit.
        """
        layer, index = slot
        for place in self.places.get((kind, layer), ()):
            if index < len(place):
                return place, index
            index -= len(place)
        raise SelectionError(f"{what} names {NAMES[kind][:-1]} {slot[1]} of layer {layer}: {self._inventory(kind)}.")

    def _inventory(self, kind: str) -> str:
        counts = {layer: sum(map(len, places)) for layer, places in self.layers(kind).items()}
        if not counts:
            return f"{self.anatomy.space.model} has no {NAMES[kind]}"
        sizes = Counter(counts.values())
        shown = " or ".join(f"0-{n - 1}" for n in sorted(sizes))
        by_group = any(place.parent is not None for places in self.layers(kind).values() for place in places)
        what = "KV groups" if by_group else NAMES[kind]
        return f"layers {min(counts)}-{max(counts)} of {self.anatomy.space.model} have {what} {shown}"


@lru_cache(maxsize=16)
def _table(anatomy: Anatomy) -> SlotTable:
    return SlotTable(anatomy)
