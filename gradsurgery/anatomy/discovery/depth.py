"""Which layers a tiny twin keeps: the first of every kind, in order, and at least two."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Kinds = Sequence[Hashable]
"""Per element of a list of modules, what it holds."""

_LAYERS = re.compile(r"^(num_(hidden_|encoder_|decoder_|text_)?layers|n_layers?|(en|de)coder_layers|num_blocks)$")
_PERIOD = re.compile(r"(period|offset|interval|every_n|freq|sparse_step|pattern)")
_FIRST = re.compile(r"(dense_replace|num_dense_layers|n_dense_layers|num_hash_layers|num_dense)")
_LAST = re.compile(r"kv_shared_layers$")
_PLACES = re.compile(r"layers?(_ids|_indices|_idx)?$|_idxs$")
_DEPTHS = re.compile(r"^(depths?|num_block_repeats|n_attn_blocks|block_sizes|stage_num_blocks)$")
_WIDER = re.compile(r"^(width_coefficient|width_multiplier|depth_multiplier|scale)$")
_MOST = 9
_VARIANTS = 6
"""Different values up to which a list with one value a layer speaks of kinds of layers."""


@dataclass(frozen=True)
class Layers:
    """The layers that stay, and for every layer of the real model the number of its like among them."""

    kept: list[int]
    like: list[int]


def chosen_layers(
    fields: Mapping[str, Any], overrides: Mapping[int, Mapping[str, Any]], kinds: Sequence[Kinds]
) -> dict[str, Layers]:
    """Layers of a config by the field that counts them."""
    found = {}
    for name, count in fields.items():
        if not _LAYERS.search(name) or type(count) is not int or count < 1:
            continue
        seen = [own for own in kinds if len(own) == count]
        lists = [v for v in _lists(fields, count).values() if len(set(map(str, v))) <= _VARIANTS]
        listed = [tuple(str(v[i]) for v in lists) for i in range(count)]
        told = [(listed[i], *_flags(fields, listed, i), str(overrides.get(i))) for i in range(count)]
        full = [(told[i], *(own[i] for own in seen)) for i in range(count)]
        first = {kind: i for i, kind in reversed(list(enumerate(full)))}
        chosen = sorted(first.values())
        periods = [v for n, v in fields.items() if _PERIOD.search(n) and type(v) is int and 1 < v < count]
        if len(set(told)) < len(first) or (periods and len(set(told)) == 1):  # kinds come with the layer's number
            repeat = max([chosen[-1] + 1, *((min(p, _MOST - 1) + 1 for p in periods) if len(first) == 1 else ())])
            chosen = list(range(min(count, repeat))) if repeat <= 2 * _MOST else chosen
        spare = [i for i in range(count) if i not in chosen]
        kept = sorted(chosen + spare[: max(0, 2 - len(chosen))])
        found[name] = Layers(kept, [kept.index(first[kind]) for kind in full])
    return found


def keep_layers(fields: Mapping[str, Any], small: Mapping[str, Any], layers: Mapping[str, Layers]) -> dict[str, Any]:
    """What the fields that speak of layers become."""
    changes: dict[str, Any] = {}
    for name, own in layers.items():
        count, kept = fields[name], own.kept
        changes[name] = len(kept)
        for field, value in fields.items():
            if field in _lists(fields, count):
                sizes = small.get(field, value)
                changes[field] = type(value)(sizes[i] for i in kept)
            elif _is_places(field, value, count):
                changes[field] = type(value)(new for new, old in enumerate(kept) if old in value)
            elif _FIRST.search(field) and type(value) is int:
                changes[field] = sum(i < value for i in kept)
            elif _LAST.search(field) and type(value) is int:
                changes[field] = sum(i >= count - value for i in kept)
    return changes


def _lists(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {
        n: v
        for n, v in fields.items()
        if isinstance(v, (list, tuple)) and len(v) == count > 2 and not _is_places(n, v, count)
    }


def _flags(fields: Mapping[str, Any], listed: Sequence[Hashable], layer: int) -> list[bool]:
    """What fields that hold numbers of layers say of one."""
    count, flags = len(listed), []
    for name, value in fields.items():
        if _is_places(name, value, count):
            flags.append(layer in value)
        elif _FIRST.search(name) and type(value) is int:
            flags.append(layer < value)
        elif _LAST.search(name) and type(value) is int and value > 0:
            before = range(layer + 1, count - value)  # the last of its kind before them is the one that they share
            flags += [layer >= count - value, all(listed[i] != listed[layer] for i in before)]
    return flags


def _is_places(name: str, value: Any, count: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(_PLACES.search(name))
        and all(type(v) is int and 0 <= v < count for v in value)
        and 0 < len(set(value)) == len(value)
    )


def is_staged(fields: Mapping[str, Any]) -> bool:
    """Whether layers come in stages, each with a number of its own."""
    return any(isinstance(v, (list, tuple)) and _DEPTHS.search(n) for n, v in fields.items())


def stages_of(fields: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Vision models: two blocks a stage, small pictures."""
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and _DEPTHS.search(name) and all(type(v) is int for v in value):
            changes[name] = type(value)(min(v, max(2, i + 1) if name == "depth" else 2) for i, v in enumerate(value))
        elif type(value) in (int, float) and _WIDER.search(name):
            changes[name] = min(value, 0.25 + 0.125 * step)
        elif type(value) is float and name == "depth_coefficient":
            changes[name] = min(value, 1.0)
    if is_staged(fields) and type(window := fields.get("window_size")) is int:
        changes["window_size"] = min(window, 2)
    patch, size = fields.get("patch_size"), fields.get("image_size")
    if type(size) is int and size > 64 and (is_staged(fields) or type(patch) is not int or patch < 8):
        changes["image_size"] = 64
    elif type(size) is int and type(patch) is int:
        changes |= {"image_size": 24, "patch_size": 8}
    return changes
