"""Keys that are not the key: drawn at random with the same numbers of swaps between the same layers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from gradsurgery.anatomy import Anatomy, Units
from gradsurgery.errors import DataError
from gradsurgery.keys import PermutationKey
from gradsurgery.keys.draw import neurons_inside
from gradsurgery.keys.lists import LISTS, Side, Slot, Swap, slots_of
from gradsurgery.keys.slots import Place, SlotTable

Taken = set[tuple[str, Slot, str]]


def seed_of(*parts: object) -> int:
    """A seed out of several, 63 bits: the same parts give the same one on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def whole_number(share: float, count: int) -> int:
    """``share`` of ``count``, rounded.

    Raises:
        DataError: no share.
    """
    if isinstance(share, bool) or not 0 <= share <= 1:
        raise DataError(f"a share is a number from 0 to 1, not {share!r}.")
    return round(share * count)


def wrong_key(key: PermutationKey, anatomy: Anatomy, seed: int = 0) -> PermutationKey:
    """A random key with as many swaps between each pair of layers: what a guess is that knows all but the slots.

    Uniform over such keys, so it shares slots with ``key`` by chance: a key that moves a fifth of the units, a fifth.
    """
    return corrupted_key(key, anatomy, 1.0, seed)


def corrupted_key(key: PermutationKey, anatomy: Anatomy, share: float, seed: int = 0) -> PermutationKey:
    """The key with ``share`` of its swaps replaced by random others between the same layers.

    With one seed, a larger share replaces what a smaller one replaces, and more.

    Raises:
        DataError: ``share`` outside 0 to 1.
    """
    swaps = [(name, swap) for name, found in key.lists.items() for swap in found]
    gone = whole_number(share, len(swaps))
    order = random.Random(seed_of(seed, "order")).sample(range(len(swaps)), len(swaps))
    lists: dict[str, list[Swap]] = {}
    for k in sorted(order[gone:]):
        lists.setdefault(swaps[k][0], []).append(swaps[k][1])
    draw = _Draw(key, anatomy, lists, random.Random(seed_of(seed, "slots", gone)))
    # whole units before halves, which need less room; experts before the neurons inside them
    for name, swap in sorted((swaps[k] for k in order[:gone]), key=lambda s: (s[0] != "experts", *_rank(s[0]))):
        lists.setdefault(name, []).append(draw(name, swap))
    return PermutationKey(**{name: tuple(found) for name, found in lists.items()}, model=key.model)


def _rank(name: str) -> tuple[bool, int]:
    return LISTS[name].side != "whole", list(LISTS).index(name)


class _Draw:
    """Free slots of each place, in random order."""

    def __init__(
        self, key: PermutationKey, anatomy: Anatomy, kept: dict[str, list[Swap]], draws: random.Random
    ) -> None:
        self.anatomy, self.table, self.draws = anatomy, SlotTable.of(anatomy), draws
        self.taken: Taken = set(slots_of({name: tuple(found) for name, found in kept.items()}))
        self.pools: dict[object, list[Slot]] = {}
        self.inside: dict[Slot, set[Slot]] = {}
        kinds = {LISTS[name].kind for name in key.lists}
        self.nested = {"expert", "neuron"} <= kinds
        self.in_use = {slot for kind, slot, _ in self.taken if kind == "neuron"}
        for kind, slot, _ in list(self.taken):
            self._block(kind, slot)

    def __call__(self, name: str, swap: Swap) -> Swap:
        one, other = (self._take(name, slot) for slot in swap)
        return one, other

    def _take(self, name: str, like: Slot) -> Slot:
        """A free slot of the layer, and of the shape, that a slot has."""
        kind, side = LISTS[name].kind, LISTS[name].side
        shape = self.table.locate(kind, like, name)[0].shape(side)
        pool = self._pool(kind, like[0], side, shape)
        sides = ("producers", "consumers") if side == "whole" else (side,)
        while pool:
            slot = pool.pop()
            if any((kind, slot, part) in self.taken for part in sides) or self.in_use & self._inside(kind, slot):
                continue
            self.taken.update((kind, slot, part) for part in sides)
            self._block(kind, slot)
            return slot
        raise DataError(f"{name}: no {kind} of layer {like[0]} is left to draw; the key moves too many of them.")

    def _pool(self, kind: str, layer: int, side: Side, shape: object) -> list[Slot]:
        at = (kind, layer, side, shape)
        if at not in self.pools:
            slots, start = [], 0
            for place in self.table.layers(kind)[layer]:
                if place.shape(side) == shape:
                    slots += [(layer, start + i) for i in range(len(place))]
                start += len(place)
            self.draws.shuffle(slots)
            self.pools[at] = slots
        return self.pools[at]

    def _inside(self, kind: str, slot: Slot) -> set[Slot]:
        """The neurons inside an expert, where the key moves both: who moves with its expert is not moved again."""
        if kind != "expert" or not self.nested:
            return set()
        if slot not in self.inside:
            self.inside[slot] = set(neurons_inside(self.anatomy, [slot]))
        return self.inside[slot]

    def _block(self, kind: str, slot: Slot) -> None:
        for neuron in self._inside(kind, slot):
            self.taken.update(("neuron", neuron, part) for part in ("producers", "consumers"))


def keyed_units(key: PermutationKey, anatomy: Anatomy) -> list[Units]:
    """Both ends of every swap, a `Units` each: a KV group with its heads, a neuron, an expert."""
    table = SlotTable.of(anatomy)
    slots = dict.fromkeys((kind, slot) for kind, slot, _ in slots_of(key.lists))
    return [_unit(anatomy, *table.locate(kind, slot, kind)) for kind, slot in slots]


def _unit(anatomy: Anatomy, place: Place, index: int) -> Units:
    return Units(anatomy, {place.position: sum(1 << int(unit) for unit in place.units(index))})


def joined(units: list[Units]) -> Units:
    """Many units as one; merging bit sets, since ``|`` would do it pair by pair."""
    chosen: dict[int, int] = {}
    for position, bits in _bits(units):
        chosen[position] = chosen.get(position, 0) | bits
    return Units(units[0].anatomy, chosen)


def _bits(units: list[Units]) -> Iterator[tuple[int, int]]:
    return (item for one in units for item in one.chosen.items())
