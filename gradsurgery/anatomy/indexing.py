"""``[layers, units]``: what an index of units means, and how it is shown."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradsurgery.errors import SelectionError

if TYPE_CHECKING:
    from gradsurgery.anatomy.units import Units

Index = int | slice | Sequence[int] | np.ndarray | torch.Tensor
PLURALS = {"head": "heads", "kv_group": "kv_groups", "neuron": "neurons", "expert": "experts", "latent": "latents"}


def layers_of(index: Index, units: Units) -> set[int]:
    have = {units.anatomy.groups[g].layer for g in units.chosen}
    count = units.anatomy.num_layers
    if isinstance(index, slice):
        return have & set(range(count)[index])
    if is_bool(index) and np.size(index) != count:
        raise SelectionError(f"a bool index of {np.size(index)} does not fit {count} layers.")
    asked = [index] if isinstance(index, int) else list(map(int, np.flatnonzero(index) if is_bool(index) else index))
    resolved = {i + count if i < 0 else i for i in asked}
    if missing := resolved - have:
        kind = PLURALS.get(units.grain, "units")
        found = f"layers {show_set(have)} have them" if have else "no layer has them"
        raise SelectionError(f"{units.space.model} has no {kind} in layer {show_set(missing)}: {found}.")
    return resolved


def positions(index: Index, count: int) -> np.ndarray:
    """Positions among ``count`` units; explicit ones that this group does not have are left out."""
    if isinstance(index, slice):
        return np.arange(count)[index]
    if is_bool(index):
        flags = np.asarray(index)
        if flags.size != count:
            raise SelectionError(f"a bool index of {flags.size} does not fit a group of {count} units.")
        return np.flatnonzero(flags)
    asked = np.asarray([index] if isinstance(index, int) else index, dtype=np.int64).reshape(-1)
    return np.unique(np.where(asked < 0, asked + count, asked)[(asked >= -count) & (asked < count)])


def missing_units(index: Index, counts: Sequence[int]) -> list[int]:
    """Explicit unit numbers that no group of these sizes has."""
    if isinstance(index, slice) or is_bool(index):
        return []
    asked = [index] if isinstance(index, int) else np.asarray(index).reshape(-1).tolist()
    largest = max(counts, default=0)
    return [unit for unit in asked if not -largest <= unit < largest]


def plain(index: Index) -> Index:
    """The index as an int, a slice, or something to iterate over; anything but integers and bools is refused."""
    if isinstance(index, slice):
        return index
    if isinstance(index, bool) or (np.asarray(index).dtype.kind not in "iub" and np.size(index)):
        raise SelectionError(f"units are indexed by integers, slices or bool masks, not by {index!r}.")
    return index if np.ndim(index) else operator.index(index)  # type: ignore[arg-type]


def is_bool(index: object) -> bool:
    return not isinstance(index, int | slice) and np.asarray(index).dtype == np.bool_


def show(index: Index) -> str:
    if isinstance(index, slice):
        parts = ["" if v is None else str(v) for v in (index.start, index.stop)]
        return ":".join(parts) + (f":{index.step}" if index.step is not None else "")
    if isinstance(index, int):
        return str(index)
    return str([int(i) for i in (np.flatnonzero(index) if is_bool(index) else np.asarray(index))])


def show_set(numbers: set[int]) -> str:
    ordered = sorted(numbers)
    contiguous = len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]}-{ordered[-1]}" if contiguous else ", ".join(map(str, ordered))
