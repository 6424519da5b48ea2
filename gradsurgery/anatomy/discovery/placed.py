"""Declared layouts at the shapes of one model: drafts that nothing has verified yet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from gradsurgery.anatomy.layouts import Layout
from gradsurgery.errors import AnatomyError

from .axes import Parts, Sizes, solve
from .draft import Draft, Slot
from .names import config_of
from .namespace import Namespace


@dataclass(frozen=True)
class Field:
    """One tensor (or one a unit) of a layout: the axes of its dimensions, ``None`` where a dimension is whole."""

    name: str | tuple[str, ...]
    role: str
    shape: tuple[int, ...]
    dims: tuple[Parts | None, ...]
    buffer: bool

    @property
    def axes(self) -> set[str]:
        return set().union(*(parts.names for parts in self.dims if parts is not None))

    def places(self) -> Iterator[tuple[Parts, int, str]]:
        """What axes make up, its size, and what to call it in an error."""
        if not isinstance(self.name, str):
            yield Parts((("unit",),)), len(self.name), f"layouts: the tensors like {self.name[0]}"
        name = self.name if isinstance(self.name, str) else self.name[0]
        for dim, (parts, size) in enumerate(zip(self.dims, self.shape, strict=True)):
            if parts is not None:
                yield parts, size, f"layouts: {name}, dimension {dim}"

    def slot(self, keys: tuple[str, ...], ids: np.ndarray, sizes: Sizes) -> Slot:
        """The slice of every unit; a unit is a coordinate along each of the axes ``keys`` (``ids``: [units, keys])."""
        index = {}
        for dim, parts in enumerate(self.dims):
            own = [k for k, key in enumerate(keys) if parts is not None and key in parts.names]
            if parts is None or not own:
                continue
            spans = [sizes[keys[k]] for k in own]
            labels = np.stack([parts.labels(keys[k], sizes) for k in own])
            inside = np.flatnonzero((labels >= 0).all(0))
            codes = np.ravel_multi_index(tuple(labels[:, inside]), spans)
            rows = inside[np.argsort(codes, kind="stable")].reshape(math.prod(spans), -1)
            if rows.shape[1] < self.shape[dim]:
                index[dim] = rows[np.ravel_multi_index(tuple(ids[:, own].T), spans)].astype(np.int64)
        return Slot(self.name, index, self.role, self.buffer)


def place(layout: Layout, module: str, space: Namespace) -> list[Draft]:
    """Drafts of one matched module: a KV group before its heads, the neurons of each expert, or one draft.

    Raises:
        AnatomyError: A tensor is missing, or the patterns do not fit the shapes.
    """
    fields = _fields(layout, module, space)
    sizes = solve([place for f in fields for place in f.places()], _sizes(layout, module, space.model))
    riders = _riders(fields, space) if layout.kind != "expert" else ()

    def draft(kind: str, keys: tuple[str, ...], ids: np.ndarray) -> Draft:
        mine = [f for f in fields if keys[-1] in f.axes or not isinstance(f.name, str)]
        return Draft(kind, module, tuple(f.slot(keys, ids, sizes) for f in mine), len(ids), riders)

    numbers = np.arange(sizes["unit"])[:, None]
    if "expert" in sizes:
        every = range(sizes["expert"])
        pairs = [np.concatenate([np.full_like(numbers, e), numbers], axis=1) for e in every]
        return [replace(draft(layout.kind, ("expert", "unit"), pairs[e]), expert=e) for e in every]
    if "group" in sizes:
        return _grouped(draft, sizes, {str(f.name): f.shape for f in fields})
    found = draft(layout.kind, ("unit",), numbers)
    return [replace(found, closed=False)] if layout.kind == "expert" else [found]


def _grouped(draft, sizes: Sizes, shapes: dict[str, tuple[int, ...]]) -> list[Draft]:  # type: ignore[no-untyped-def]
    """KV groups and their heads, numbered as their consumer columns lie; heads alone where nothing is shared."""
    keys = ("group", "unit")
    ids = np.stack(np.unravel_index(np.arange(sizes["group"] * sizes["unit"]), [sizes[k] for k in keys]), axis=1)
    columns = next(s for s in draft("head", keys, ids).slots if s.role == "consumer").index
    if columns:
        ids = ids[np.lexsort([rows[:, 0] for _, rows in sorted(columns.items(), reverse=True)])]
    group, heads = draft("kv_group", keys[:1], np.arange(sizes["group"])[:, None]), draft("head", keys, ids)
    if sizes["unit"] == 1:
        return [replace(group, kind="head")]
    if _entries(group, shapes) == _entries(heads, shapes):
        return [heads]
    return [group, replace(heads, parent=group, parent_units=tuple(ids[:, 0].tolist()))]


def _entries(draft: Draft, shapes: dict[str, tuple[int, ...]]) -> int:
    """Entries that all units together hold."""

    def width(slot: Slot) -> int:
        return math.prod(slot.index[d].shape[1] if d in slot.index else n for d, n in enumerate(shapes[str(slot.name)]))

    return draft.count * sum(map(width, draft.slots))


def _fields(layout: Layout, module: str, space: Namespace) -> list[Field]:
    """The tensors of a layout in one module."""
    fields = []
    for path, pattern in layout.patterns.items():
        role = "producer" if path in layout.producers else "consumer"
        whole = "{unit}" in path
        named = [space.tensor(p, module) for p in (space.counted(path, module) if whole else [path])]
        if len({shape for _, _, shape in named}) > 1:
            raise AnatomyError(f"layouts: {path!r} in {module}: its tensors differ in shape, so they are no units.")
        name, buffer, shape = named[0]
        names = tuple(n for n, _, _ in named) if whole else name
        fields.append(Field(names, role, shape, pattern.over(shape, f"layouts: {name}"), buffer))
    listed = [n for f in fields for n in ([f.name] if isinstance(f.name, str) else f.name)]
    if twice := {n for n in listed if listed.count(n) > 1}:
        raise AnatomyError(f"layouts: {sorted(twice)[0]} stands twice in one layout, under two names of a tied weight.")
    for made in (f for f in fields if f.role == "producer"):
        bias, _, shape = space.known.get(_bias_of(made), ("", False, ()))
        along = [(n,) for n, p in zip(made.shape, made.dims, strict=True) if p and p.names & {"unit", "group"}]
        if bias and bias not in listed and shape in along:
            raise AnatomyError(f"layouts: {bias} runs along {made.name}, but has no pattern; it is part of the units.")
    return fields


def _sizes(layout: Layout, module: str, model: nn.Module) -> Sizes:
    config, sizes = config_of(model, module), {}
    for axis, size in layout.sizes.items():
        value: object = size
        if isinstance(size, str):
            value = config
            for step in size.split("."):
                value = getattr(value, step, None)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                whose = "there is no config" if config is None else f"{type(config).__name__} says {value!r}"
                raise AnatomyError(
                    f"layouts: sizes={{{axis!r}: {size!r}}} for {module or type(model).__name__}: {whose}, and a field "
                    "with a positive number was expected."
                )
        sizes[axis] = int(value)  # type: ignore[call-overload]
    return sizes


def _riders(fields: list[Field], space: Namespace) -> tuple[str, ...]:
    """Output biases of the consumers."""
    held = {f.name for f in fields}
    biases = [space.known[_bias_of(f)][0] for f in fields if f.role == "consumer" and _bias_of(f) in space.known]
    return tuple(dict.fromkeys(bias for bias in biases if bias not in held))


def _bias_of(field: Field) -> str:
    """The bias beside a weight, if the layer has one."""
    return f"{field.name.rpartition('.')[0]}.bias" if isinstance(field.name, str) else ""
