"""Anatomies as JSON: index arrays as ``first unit + step``, so that 70B models stay a page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from gradsurgery.anatomy.groups import Footprint, UnitGroup
from gradsurgery.anatomy.quantised import Quantised
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import ArtefactError
from gradsurgery.files import read_json, write_json
from gradsurgery.formats import stamp, upgraded

if TYPE_CHECKING:
    from gradsurgery.anatomy.anatomy import Anatomy

KIND, AGAIN = "an anatomy", "dissect the model again and save it"


def describe(anatomy: Anatomy) -> dict[str, Any]:
    """The anatomy as plain JSON data, without version and time."""
    space = anatomy.space
    return {
        "model": space.model,
        "fingerprint": space.fingerprint,
        "shapes": {name: list(shape) for name, shape in space.shapes.items()},
        "aliases": space.aliases,
        "layout": space.layout,
        "structural": anatomy.structural,
        "groups": [_describe_group(group) for group in anatomy.groups],
    }


def _describe_group(group: UnitGroup) -> dict[str, Any]:
    out: dict[str, Any] = {
        "kind": group.kind,
        "name": group.name,
        "layer": group.layer,
        "closed": group.closed,
        "consumer_slots": list(group.consumer_slots),
        "exchange_classes": _pack(np.asarray(group.exchange_classes).reshape(-1, 1)),
        "riders": list(group.riders),
        "parent": group.parent,
        "parent_units": list(group.parent_units) if group.parent_units is not None else None,
        "footprints": [],
    }
    for footprint in group.footprints:
        name = footprint.name if isinstance(footprint.name, str) else list(footprint.name)
        index = {str(dim): _pack(rows) for dim, rows in footprint.index.items()}
        out["footprints"].append({"name": name, "index": index, "buffer": footprint.buffer})
    return out


def _pack(rows: np.ndarray) -> dict[str, Any] | list[list[int]]:
    steps = np.diff(rows, axis=0)
    if len(rows) and (steps == (steps[:1, :1] if len(steps) else 0)).all():
        return {"units": len(rows), "first": rows[0].tolist(), "step": int(steps[0, 0]) if steps.size else 0}
    return rows.tolist()


def _unpack(packed: dict[str, Any] | list[list[int]]) -> np.ndarray:
    if isinstance(packed, dict):
        return np.asarray(packed["first"])[None] + packed["step"] * np.arange(packed["units"])[:, None]
    return np.asarray(packed, dtype=np.int64)


def save_anatomy(anatomy: Anatomy, path: Path) -> None:
    """Write an anatomy as JSON, whole or not at all."""
    header = {**stamp(KIND), "seconds": anatomy.seconds}
    stored = {name: asdict(how) for name, how in anatomy.quantised.items()}
    write_json(path, {**header, **describe(anatomy), **({"quantised": stored} if stored else {})})


def load_anatomy(path: Path, model: object = None) -> tuple[ParameterSpace, list[UnitGroup], dict[str, str], float]:
    """The parts of a stored anatomy; ``model`` (a module or ``None``) must be the one it was made for."""
    data = upgraded(read_json(path, KIND), KIND, path, AGAIN)
    if "groups" not in data:
        raise ArtefactError(f"{path} is no anatomy: it has no groups; {AGAIN}.")
    try:
        shapes = {name: tuple(map(int, shape)) for name, shape in data["shapes"].items()}
        space = ParameterSpace(data["model"], shapes, data["aliases"], data["layout"], _quantised(data))
        structural = data["structural"]
        _require(isinstance(space.model, str), "the model has no name")
        _require(_is_texts(space.aliases) and set(space.aliases.values()) <= set(shapes), "aliases name no parameter")
        _require(_is_texts(structural), "structural is no text by name")
        groups = [_checked(_group(item), space) for item in data["groups"]]
        parents = {(g.layer, g.name) for g in groups if g.kind == "kv_group"}
        _require(all(g.parent is None or (g.layer, g.parent) in parents for g in groups), "a KV group is missing")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtefactError(f"{path} is damaged: {json.dumps(str(error))}. Dissect the model again.") from error
    if isinstance(model, nn.Module) and (gap := space.difference(ParameterSpace.of(model))):
        raise ArtefactError(f"{path} fits another model: {gap}. Dissect this model again.")
    if isinstance(model, nn.Module):
        space = ParameterSpace.of(model)  # which knows how this very model is stored
    return space, groups, structural, data.get("seconds", 0.0)


def _quantised(data: dict[str, Any]) -> dict[str, Quantised]:
    found = {}
    for name, how in data.get("quantised", {}).items():
        block = tuple(map(int, how["block"])) if how["block"] is not None else None
        found[name] = Quantised(str(how["scheme"]), tuple(map(int, how["shape"])), block)
    return found


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _is_texts(data: object) -> bool:
    return isinstance(data, dict) and all(isinstance(value, str) for value in data.values())


def _checked(group: UnitGroup, space: ParameterSpace) -> UnitGroup:
    """``group`` if its fields have their types and its slices lie in the model's parameters."""
    _require(isinstance(group.kind, str) and isinstance(group.name, str), "a group has no kind or name")
    _require(type(group.layer) is int and type(group.closed) is bool, f"layer or closed of {group.name} is wrong")
    _require(all(0 <= k < len(group.footprints) for k in group.consumer_slots), f"{group.name} lacks its consumers")
    _require(bool(group.consumer_slots), f"{group.name} has no consumers")
    for footprint in group.footprints:
        names = {footprint.name} if isinstance(footprint.name, str) else set(footprint.name)
        for name in names if not footprint.buffer else ():
            shape = space.shapes[space.aliases.get(name, name)]
            for dim, rows in footprint.index.items():
                inside = rows.ndim == 2 and len(rows) == len(group) and rows.min() >= 0 and rows.max() < shape[dim]
                _require(bool(inside), f"a slice of {group.name} does not fit {name}")
    return group


def _group(item: dict[str, Any]) -> UnitGroup:
    footprints = tuple(
        Footprint(
            f["name"] if isinstance(f["name"], str) else tuple(f["name"]),
            {int(dim): _unpack(rows) for dim, rows in f["index"].items()},
            f["buffer"],
        )
        for f in item["footprints"]
    )
    classes = tuple(_unpack(item["exchange_classes"]).reshape(-1).tolist())
    parents = item["parent_units"]
    return UnitGroup(
        kind=item["kind"],
        name=item["name"],
        layer=item["layer"],
        footprints=footprints,
        consumer_slots=tuple(item["consumer_slots"]),
        exchange_classes=classes,
        closed=item["closed"],
        parent=item["parent"],
        parent_units=tuple(parents) if parents is not None else None,
        riders=tuple(item["riders"]),
    )
