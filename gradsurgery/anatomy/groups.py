"""Unit groups: the exchange-comparable units of one place in a model, as index arrays.

A group of a 70B model holds 28,672 neurons, so units are never objects of their own: a group keeps one index array a
slice, and ``.units`` builds the slices of a unit when somebody looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Slice = tuple[str, dict[int, tuple[int, ...]]]
"""``(parameter name, {dim: indices})``; dimensions that are not named are whole."""


@dataclass(frozen=True, eq=False)
class Footprint:
    """Slice ``k`` of every unit of a group.

    Args:
        name: Parameter (or buffer) name in the model; a tuple of names, one per unit, where every unit owns tensors.
        index: ``dim -> int64 [units, width]``; dimensions that are not named belong to the unit whole.
        buffer: The tensor is a buffer: it moves with the unit but never belongs to a region.
    """

    name: str | tuple[str, ...]
    index: dict[int, np.ndarray] = field(default_factory=dict)
    buffer: bool = False

    def name_of(self, unit: int) -> str:
        return self.name if isinstance(self.name, str) else self.name[unit]

    def slice_of(self, unit: int) -> Slice:
        return self.name_of(unit), {dim: tuple(map(int, rows[unit])) for dim, rows in self.index.items()}


class UnitSlices(Sequence[tuple[Slice, ...]]):
    """The slices of each unit, built on access; slice ``k`` of one unit corresponds to slice ``k`` of another."""

    def __init__(self, footprints: Sequence[Footprint], count: int) -> None:
        self._footprints, self._count = tuple(footprints), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, unit):  # type: ignore[no-untyped-def, override]
        if isinstance(unit, slice):
            return [self[i] for i in range(*unit.indices(self._count))]
        if not -self._count <= unit < self._count:
            raise IndexError(f"unit {unit} of {self._count}")
        return tuple(footprint.slice_of(unit % self._count) for footprint in self._footprints)


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of one kind in one place of one layer.

    Attributes:
        kind: ``"head"``, ``"kv_group"``, ``"neuron"``, ``"expert"``, ``"latent"``.
        name: Path of the module that owns the group, for narrowing by name.
        layer: Absolute layer number.
        footprints: Everything that belongs to a unit, producers first, consumers included.
        consumer_slots: Positions in ``footprints`` that are consumers (the columns that read the units).
        exchange_classes: One int per unit; equal means interchangeable.
        closed: False where a full-width norm couples the units, so that ablating differs from pruning.
        parent: Name of the ``"kv_group"`` group of the same layer that holds what these heads share.
        parent_units: Per unit, the index of its unit in the parent group.
        riders: Output-bias parameters of the consumers; they belong to no unit and ride along in ``Anatomy.rest``.
    """

    kind: str
    name: str
    layer: int
    footprints: tuple[Footprint, ...]
    consumer_slots: tuple[int, ...]
    exchange_classes: tuple[int, ...]
    closed: bool
    parent: str | None = None
    parent_units: tuple[int, ...] | None = None
    riders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.exchange_classes)

    @property
    def units(self) -> UnitSlices:
        return UnitSlices(self.footprints, len(self))

    @property
    def consumers(self) -> UnitSlices:
        return UnitSlices([self.footprints[k] for k in self.consumer_slots], len(self))

    def __repr__(self) -> str:
        return f"UnitGroup({self.kind!r}, {self.name!r}, layer={self.layer}, units={len(self)})"
