"""Drafts become unit groups: names, layers, order."""

from __future__ import annotations

from torch import nn

from ..groups import Footprint, UnitGroup
from .draft import Draft
from .experts import common_module
from .names import canonical_of
from .partition import is_list

_ORDER = {"head": 0, "kv_group": 1, "neuron": 2, "expert": 3, "latent": 4}


def groups_from(drafts: list[Draft], model: nn.Module) -> tuple[UnitGroup, ...]:
    """Unit groups in layer order."""
    lists = {path for path, module in model.named_modules() if is_list(module)}
    buffers = {name for name, _ in model.named_buffers()}
    groups = [_group(draft, lists, buffers) for draft in drafts]
    places: dict[str, int] = {}
    for group in groups:
        places.setdefault(canonical_of(group.name), len(places))  # the same order in every layer
    return tuple(sorted(groups, key=lambda g: (g.layer, _ORDER[g.kind], places[canonical_of(g.name)])))


def _group(draft: Draft, lists: set[str], buffers: set[str]) -> UnitGroup:
    name = name_of(draft)
    footprints = tuple(Footprint(s.name, s.index, s.buffer or s.name in buffers) for s in draft.slots)
    consumers = tuple(k for k, s in enumerate(draft.slots) if s.role == "consumer")
    parent = name_of(draft.parent) if draft.parent is not None else None
    classes = draft.classes or (0,) * draft.count
    first = draft.slots[0].name  # a channel that the next layer reads belongs to the layer that writes it
    layer = layer_of(name, lists) or layer_of(first if isinstance(first, str) else first[0], lists)
    return UnitGroup(
        draft.kind, name, layer, footprints, consumers, classes, draft.closed, parent, draft.parent_units, draft.riders
    )


def name_of(draft: Draft) -> str:
    """The module that owns a draft: the innermost that holds all its tensors."""
    names = [n for s in draft.slots for n in ([s.name] if isinstance(s.name, str) else s.name)]
    common = common_module(names)
    if draft.expert is not None and not common.endswith((f".{draft.expert}", f"_{draft.expert}")):
        common = f"{common}.{draft.expert}"
    return common


def layer_of(name: str, lists: set[str]) -> int:
    """Number of the outermost list element that holds ``name``."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if ".".join(parts[:i]) in lists and parts[i].isdigit():
            return int(parts[i])
    return 0
