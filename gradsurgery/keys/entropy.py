"""How many keys there are: log2 of their number, exactly, from the numbers of swaps between each pair of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import lgamma, log

from gradsurgery.anatomy import Anatomy
from gradsurgery.keys.lists import LISTS, Swap
from gradsurgery.keys.slots import SlotTable


def bits(lists: Mapping[str, tuple[Swap, ...]], anatomy: Anatomy, functional: bool = False) -> float:
    r"""Bits of a key whose numbers of swaps ``n_ab`` between places ``a`` and ``b`` are known, and nothing else.

    A place ``a`` has ``m_a`` slots, of which ``s_a`` are swapped. There are

    ``prod_a m_a! / ((m_a - s_a)! prod_b n_ab!) * prod_{a<b} n_ab!``

    such keys (the units of each place are dealt out to its partners, then paired), and within a place, ``(2n)!`` of the
    units that are dealt to it make ``(2n)! / (2^n n!)`` pairings. With ``functional``, pairings count once: which of
    the units that came from one layer takes which place there changes nothing that C2 computes (where units of a layer
    are interchangeable, and none of whose halves are swapped). Experts and neurons are counted on their own, although
    no key may swap both an expert and neurons inside it.
    """
    table, total = SlotTable.of(anatomy), 0.0
    for name, swaps in lists.items():
        kind, side = LISTS[name].kind, LISTS[name].side
        sizes: dict[int, int] = {}
        between: Counter[tuple[int, int]] = Counter()
        for k, swap in enumerate(swaps):
            places = [table.locate(kind, slot, f"{name}[{k}]")[0] for slot in swap]
            sizes.update({place.position: len(place) for place in places})
            a, b = sorted(place.position for place in places)
            between[a, b] += 1
        free = functional and side == "whole"
        for place, size in sizes.items():
            dealt = [n for (a, b), n in between.items() if place in (a, b) and a != b]
            inside = 2 * between[place, place]
            total += _log_factorial(size) - _log_factorial(size - sum(dealt) - inside)
            total -= sum(map(_log_factorial, [*dealt, inside]))
            if free and inside:  # a swap inside a layer of interchangeable units does nothing
                total -= _log_choose(size - sum(dealt), inside)
        for (a, b), n in between.items():
            if a == b and not free:
                total += _log_factorial(2 * n) - _log_factorial(n) - n * log(2)
            elif a != b and not free:
                total += _log_factorial(n)
    return total / log(2)


def _log_factorial(n: int) -> float:
    return lgamma(n + 1)


def _log_choose(n: int, k: int) -> float:
    return _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k)
