"""What the layers of a model do differently that moves with no unit: attention windows, kinds of attention."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from gradsurgery.errors import KeyWarning
from gradsurgery.keys.lists import LISTS, Swap
from gradsurgery.keys.plan import KeyPlan

PER_LAYER = ("layer_types", "attention_layers", "no_rope_layers")
"""Attributes of a configuration that hold one entry a layer."""


def warn_of(plan: KeyPlan, model: nn.Module, lists: Mapping[str, tuple[Swap, ...]]) -> None:
    """Say what swapped heads meet in their new layer; it is allowed, and C2 works with it."""
    for note in (*plan.notes, *differences(model, lists)):
        warnings.warn(note, KeyWarning, stacklevel=5)


def differences(model: nn.Module, lists: Mapping[str, tuple[Swap, ...]]) -> list[str]:
    """Swaps of heads between layers that the configuration calls different."""
    config = getattr(model, "config", None)
    heads = [swap for name, swaps in lists.items() if LISTS[name].kind == "head" for swap in swaps]
    out = []
    for name in PER_LAYER:
        kinds = getattr(config, name, None)
        if not isinstance(kinds, (list, tuple)):
            continue
        layers = [(a[0], b[0]) for a, b in heads if max(a[0], b[0]) < len(kinds)]
        moved = [(a, b) for a, b in layers if kinds[a] != kinds[b]]
        if moved:
            a, b = moved[0]
            out.append(
                f"{len(moved)} of {len(heads)} swaps of heads join layers with different {name} (layer {a}: "
                f"{kinds[a]}, layer {b}: {kinds[b]}); a moved head works with the window of its new layer."
            )
    return out
