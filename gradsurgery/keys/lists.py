"""The lists of swaps that a key is made of: which units each speaks of, and which of their slices it moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradsurgery.errors import SelectionError

Slot = tuple[int, int]
"""``(layer, index)``; the index counts the units of a kind through all groups of the layer."""
Swap = tuple[Slot, Slot]
Side = Literal["whole", "producers", "consumers"]


@dataclass(frozen=True)
class SwapList:
    """What one list of a key's file means.

    Attributes:
        kind: Kind of the units.
        side: The slices that move: all, those that make the activations, or those that read them.
    """

    kind: str
    side: Side


LISTS = {
    "attn_heads": SwapList("head", "whole"),
    "mlp_cols": SwapList("neuron", "whole"),
    "experts": SwapList("expert", "whole"),
    "attn_out_heads": SwapList("head", "consumers"),
    "mlp_up_cols": SwapList("neuron", "producers"),
    "mlp_down_cols": SwapList("neuron", "consumers"),
}
"""By the names of the originals' key files; ``experts`` is ours."""


def as_swaps(given: Any) -> Any:
    """Nested lists as nested tuples, whatever they hold: `check_swaps` judges it."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return given
    return tuple(as_swaps(part) for part in given)


def check_swaps(name: str, swaps: Any) -> None:
    """Raise ``SelectionError`` unless ``swaps`` are pairs of ``[layer, index]``, whole numbers from 0 on."""
    if not isinstance(swaps, tuple):
        raise SelectionError(f"{name} is a list of swaps [[layer, i], [layer, j]], not {type(swaps).__name__}.")
    for k, swap in enumerate(swaps):
        slots = swap if isinstance(swap, tuple) and len(swap) == 2 else ()
        pairs = [slot for slot in slots if isinstance(slot, tuple) and len(slot) == 2]
        if len(pairs) != 2:
            raise SelectionError(f"{name}[{k}] is {_show(swap)}; a swap is [[layer, i], [layer, j]].")
        for number in (*pairs[0], *pairs[1]):
            if type(number) is not int or number < 0:
                raise SelectionError(
                    f"{name}[{k}] is {_show(swap)}; layers and indices are whole numbers from 0 on, not {number!r}."
                )


def check_slots(lists: dict[str, tuple[Swap, ...]]) -> None:
    """Raise ``SelectionError`` where a slot is named twice, so that applying a key twice would not be the identity."""
    taken: dict[tuple[str, Slot, str], str] = {}
    for name, swaps in lists.items():
        kind, side = LISTS[name].kind, LISTS[name].side
        sides = ("producers", "consumers") if side == "whole" else (side,)
        for k, swap in enumerate(swaps):
            for slot in swap:
                for part in sides:
                    before = taken.setdefault((kind, slot, part), f"{name}[{k}]")
                    if before != f"{name}[{k}]" or swap[0] == swap[1]:
                        both = f"{before} and {name}[{k}]" if before != f"{name}[{k}]" else f"{name}[{k}], twice"
                        raise SelectionError(
                            f"slot {list(slot)} stands in {both}; each slot may be swapped once, or applying the key "
                            f"twice would not lead back."
                        )


def slots_of(lists: dict[str, tuple[Swap, ...]]) -> Iterator[tuple[str, Slot, str]]:
    """Everything that a key moves, as ``(kind, slot, side)``."""
    for name, swaps in lists.items():
        kind, side = LISTS[name].kind, LISTS[name].side
        for swap in swaps:
            for slot in swap:
                for part in ("producers", "consumers") if side == "whole" else (side,):
                    yield kind, slot, part


def canonical(swaps: tuple[Swap, ...]) -> list[Swap]:
    """The swaps in one order of all that mean the same."""
    return sorted((min(a, b), max(a, b)) for a, b in swaps)


def _show(value: Any) -> str:
    text = repr(value).replace(",)", ")").replace("(", "[").replace(")", "]")
    return text if len(text) < 80 else text[:77] + "…"
