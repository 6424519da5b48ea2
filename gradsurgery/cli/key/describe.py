"""What may be said of a key: counts, layers, entries, entropy, fingerprint; never the swaps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from gradsurgery.anatomy import Anatomy
from gradsurgery.errors import KeyWarning
from gradsurgery.evaluation.tables import table
from gradsurgery.keys import PermutationKey
from gradsurgery.keys.lists import Swap
from gradsurgery.keys.windows import differences


def describe(key: PermutationKey, anatomy: Anatomy | None = None, whole_model: bool = True) -> str:
    """A table, a row for each list, and the entropy where the anatomy is known.

    Args:
        key: The key.
        anatomy: Of its model; without it there are counts alone.
        whole_model: The anatomy knows all entries of the model, so that shares of it can be given.
    """
    rows = []
    swappable = (anatomy.kv_groups | anatomy.neurons | anatomy.experts).numel() if anatomy is not None else 0
    lists = dict(key.lists)
    for name, swaps in [*lists.items(), *([("all", ())] if len(lists) > 1 else [])]:
        part = key if name == "all" else PermutationKey(**{name: swaps}, model=key.model)
        every = [swap for found in part.lists.values() for swap in found]
        row: dict[str, object] = {"list": name, "swaps": len(every), "layers": layers_of(every)}
        row["pairs of layers"] = len({tuple(sorted((a[0], b[0]))) for a, b in every})
        if anatomy is not None:
            entries = part.region(anatomy).numel()
            row |= {"entries": entries, "of swappable": f"{100 * entries / swappable:.2f}%"}
            row |= {"of the model": f"{100 * entries / anatomy.space.numel():.2f}%"} if whole_model else {}
        rows.append(row)
    out = table(rows)
    if anatomy is not None:
        bits, functional = (key.entropy_bits(anatomy, functional=f) for f in (False, True))
        out += (
            f"\nentropy: {bits:,.1f} bits among the keys with as many swaps between the same layers, "
            f"{functional:,.1f} bits of keys that compute something else"
        )
    return out


def layers_of(swaps: Sequence[Swap]) -> str:
    """Layers that swaps touch, as runs: ``0-3, 7``."""
    layers = sorted({layer for swap in swaps for layer, _ in swap})
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def warn_of_differences(key: PermutationKey, anatomy: Anatomy, model: nn.Module) -> None:
    """What swapped heads meet in their new layers: windows, slopes."""
    for note in (*key.plan(anatomy).notes, *differences(model, key.lists)):
        warnings.warn(note, KeyWarning, stacklevel=2)
