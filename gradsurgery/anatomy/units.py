"""Units: regions that remember which heads, neurons and experts they are made of."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gradsurgery.anatomy.entries import Entries, bits_of, indices_of
from gradsurgery.anatomy.groups import Footprint, UnitGroup
from gradsurgery.anatomy.indexing import PLURALS, Index, layers_of, missing_units, plain, positions, show
from gradsurgery.anatomy.region import Region, _join, bracketed
from gradsurgery.anatomy.space import require_same_space
from gradsurgery.errors import SelectionError

if TYPE_CHECKING:
    from gradsurgery.anatomy.anatomy import Anatomy

log = logging.getLogger("gradsurgery")


class Units(Region):
    """Some units of an anatomy: a region that can also be zeroed, detached, permuted and removed.

    Index with ``[layers, units]``: absolute layer numbers (an int that has none raises, slices skip layers without the
    kind) and unit numbers within each group (``-1`` is the last of each). ``|``, ``&`` and ``-`` of units are units,
    and are about units: two heads that complete a KV group bring its shared rows. ``~`` is a plain region.

    Args:
        anatomy: The anatomy the units are of.
        chosen: Bit set of units by position of their group in ``anatomy.groups``.
        grain: What ``[layers, units]`` counts: ``"head"``, ``"kv_group"``, ``"neuron"``, ``"expert"`` or ``"latent"``.
        riders: Parameters that ride along (the output biases of ``Anatomy.rest``).
        text: Short form for configs and artefacts.
    """

    def __init__(
        self, anatomy: Anatomy, chosen: dict[int, int], grain: str = "", riders: Region | None = None, text: str = ""
    ) -> None:
        self.anatomy, self.space, self.grain, self.text = anatomy, anatomy.space, grain, text
        self.chosen = {g: bits for g, bits in sorted(chosen.items()) if bits}
        self.riders = riders

    @property
    def groups(self) -> Iterator[tuple[UnitGroup, np.ndarray]]:
        """Each group that holds chosen units, with their indices."""
        return ((self.anatomy.groups[g], indices_of(bits)) for g, bits in self.chosen.items())

    @property
    def count(self) -> int:
        """Number of units (heads count as heads, also where they were chosen by KV group)."""
        return sum(bits.bit_count() for bits in self.chosen.values())

    @property
    def closed(self) -> bool:
        """Whether ablating these units equals pruning them."""
        return all(group.closed for group, _ in self.groups)

    @cached_property
    def entries(self) -> dict[str, Entries]:  # type: ignore[override]
        parts: dict[str, Entries] = dict(self.riders.entries) if self.riders is not None else {}
        for group, units in self.groups:
            self._add(parts, group.footprints, units)
            if group.parent is not None:
                parent, complete = self.anatomy.complete_parents(group, units)
                if complete.size:
                    self._add(parts, parent.footprints, complete)
                if complete.size < np.unique(np.asarray(group.parent_units)[units]).size:
                    self.anatomy.say_shared(group)
        return Region(self.space, parts).entries

    @cached_property
    def consumers(self) -> Region:
        """The consumer slices alone: where the units' activations are read."""
        parts: dict[str, Entries] = {}
        for group, units in self.groups:
            self._add(parts, [group.footprints[k] for k in group.consumer_slots], units)
        return Region(self.space, parts, self.text and f"consumers of {self.text}")

    def _add(self, parts: dict[str, Entries], footprints: Sequence[Footprint], units: np.ndarray) -> None:
        for footprint in footprints:
            if footprint.buffer:
                continue
            for name, index in _merged(footprint, units):
                name = self.space.canonical(name)
                entries = Entries.box(self.space.shapes[name], index)
                parts[name] = parts[name] | entries if name in parts else entries

    def __getitem__(self, key: tuple[Index, Index]) -> Units:
        if not isinstance(key, tuple) or len(key) != 2:
            raise SelectionError(f"{self.text or 'units'}[{key!r}]: units are indexed as [layers, units].")
        key = (plain(key[0]), plain(key[1]))
        layers = layers_of(key[0], self)
        text = f"{bracketed(self.text)}[{show(key[0])}, {show(key[1])}]" if self.text else ""
        chosen = {}
        for g, bits in self.chosen.items():
            group = self.anatomy.groups[g]
            if group.layer in layers:
                chosen[g] = bits & self._pick(group, key[1])
        out = Units(self.anatomy, chosen, self.grain, self._riders_of(chosen), text)
        here = [g for g in self.chosen if self.anatomy.groups[g].layer in layers]
        missing = missing_units(key[1], [self._count(self.anatomy.groups[g]) for g in here])
        explicit = isinstance(key[1], int) or (not isinstance(key[1], slice) and len(key[1]) > 0)
        if not out.chosen and (explicit or not layers):
            raise SelectionError(f"{text or key} selects nothing: {self._inventory()}.")
        if missing:
            raise SelectionError(f"{text or key} names units {missing} that no group has: {self._inventory()}.")
        return out

    def _count(self, group: UnitGroup) -> int:
        """How many units ``[layers, units]`` counts in a group."""
        by_parent = self.grain == "kv_group" and group.parent is not None
        return len(self.anatomy.parent_of(group)) if by_parent else len(group)

    def _pick(self, group: UnitGroup, index: Index) -> int:
        by_parent = self.grain == "kv_group" and group.parent is not None
        picked = positions(index, self._count(group))
        if by_parent:
            picked = np.flatnonzero(np.isin(np.asarray(group.parent_units), picked))
        return bits_of(picked, len(group))

    def named(self, pattern: str) -> Units:
        """Only the groups whose name matches a glob, e.g. ``anatomy.heads.named("decoder.*cross*")``.

        Raises:
            SelectionError: no group matches.
        """
        keep = {g: b for g, b in self.chosen.items() if fnmatch.fnmatchcase(self.anatomy.groups[g].name, pattern)}
        if not keep:
            names = sorted({self.anatomy.groups[g].name for g in self.chosen})
            raise SelectionError(f"no group is named like {pattern!r}: there are {', '.join(names[:6])}.")
        text = f"{bracketed(self.text)}.named({pattern!r})" if self.text else ""
        return Units(self.anatomy, keep, self.grain, self._riders_of(keep), text)

    def _riders_of(self, chosen: dict[int, int]) -> Region | None:
        """The riders of some of the groups; a rider several groups share stays with each."""
        if self.riders is None:
            return None
        names = {self.space.canonical(n) for g, bits in chosen.items() if bits for n in self.anatomy.groups[g].riders}
        kept = {name: part for name, part in self.riders.entries.items() if name in names}
        return Region(self.space, kept) if kept else None

    def _combine(self, other: Region, symbol: str) -> Region:
        if not isinstance(other, Units) or (symbol != "|" and self._overlaps_otherwise(other)):
            return super()._combine(other, symbol)
        require_same_space(other.space, self.space, f"region {other.text or 'given'}")
        chosen = dict(self.chosen)
        for g in {**self.chosen, **other.chosen}:
            a, b = self.chosen.get(g, 0), other.chosen.get(g, 0)
            chosen[g] = a | b if symbol == "|" else a & b if symbol == "&" else a & ~b
        empty = Region(self.space, {})
        riders = (self.riders or empty)._combine(other.riders or empty, symbol)
        grain = self.grain if self.grain == other.grain else ""
        return Units(self.anatomy, chosen, grain, riders if riders else None, _join(self.text, symbol, other.text))

    def __or__(self, other: Region) -> Units:  # with plain regions a Region, as ``_combine`` says
        return self._combine(other, "|")  # type: ignore[return-value]

    def _overlaps_otherwise(self, other: Units) -> bool:
        """Whether entries meet that no common unit explains: an expert and the neurons inside it."""
        return any(
            Units(self.anatomy, {g: bits}).any_of(Units(self.anatomy, {h: more}))
            for g, bits in self.chosen.items()
            for h, more in other.chosen.items()
            if g != h and self.anatomy.groups[g].kind != self.anatomy.groups[h].kind
        )

    def any_of(self, other: Region) -> bool:
        """Whether the two share an entry."""
        return any(name in other.entries and part & other.entries[name] for name, part in self.entries.items())

    def _inventory(self) -> str:
        kind = PLURALS.get(self.grain, "units")
        spans: dict[int, list[int]] = {}
        for group in (self.anatomy.groups[g] for g in self.chosen):
            whole = self.anatomy.parent_of(group) if self.grain == "kv_group" and group.parent else group
            spans.setdefault(len(whole), []).append(group.layer)
        said = [
            f"layers {min(found)}-{max(found)} of {self.space.model} have {kind} 0-{count - 1}"
            for count, found in spans.items()
        ]
        return "; ".join(said) or f"{self.space.model} has no {kind}"


def require_units(region: Region, what: str) -> Units:
    """``region`` as non-empty units, or a ``SelectionError`` with the way out."""
    if not isinstance(region, Units):
        raise SelectionError(
            f"{what} needs units, and {region!r} is not made of them. "
            f"anatomy.units_within(region) gives the units that lie in a region whole."
        )
    if not region.chosen:
        raise SelectionError(f"{what}: {region.text or 'the selection'} holds no unit, so nothing would happen.")
    return region


def _merged(footprint: Footprint, units: np.ndarray) -> Iterator[tuple[str, dict[int, np.ndarray]]]:
    """The slices of many units as few boxes: units that differ in one dimension only are merged."""
    if not isinstance(footprint.name, str):
        for unit in units:
            yield footprint.name[unit], {d: rows[unit] for d, rows in footprint.index.items()}
    elif len(footprint.index) <= 1:
        yield footprint.name, {d: rows[units].reshape(-1) for d, rows in footprint.index.items()}
    else:
        by_others: dict[bytes, list[int]] = {}
        wide = max(footprint.index, key=lambda d: len(np.unique(footprint.index[d][units])))
        for unit in units:
            rest = b"|".join(rows[unit].tobytes() for d, rows in footprint.index.items() if d != wide)
            by_others.setdefault(rest, []).append(int(unit))
        for same in by_others.values():
            index = {d: rows[same[0]] for d, rows in footprint.index.items()}
            yield footprint.name, {**index, wide: footprint.index[wide][same].reshape(-1)}
