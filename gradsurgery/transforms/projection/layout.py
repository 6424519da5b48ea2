"""The blocks of a projection: which entries of which parameters are projected together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.region import Region
from gradsurgery.tensors import Box
from gradsurgery.transforms.engine.program import box_columns
from gradsurgery.transforms.stages import StepContext

if TYPE_CHECKING:
    from gradsurgery.transforms.projection.options import Projection


@dataclass(frozen=True, eq=False)
class Part:
    """Some entries of one parameter.

    Attributes:
        name: The parameter.
        block: Number of its block; rows have one each, and none here.
        boxes: The entries; ``None`` for all.
    """

    name: str
    block: int
    boxes: list[Box] | None = None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Layout:
    """The parts of all blocks.

    Attributes:
        parts: Parts of blocks that are numbered.
        rows: Parts of which every row (index of dimension 0) is a block of its own.
        blocks: How many numbered blocks there are.
    """

    parts: list[Part]
    rows: list[Part]
    blocks: int


def moving(context: StepContext) -> list[str]:
    """Parameters that this step may move: they train, and the optimizer (where one is bound) holds them."""
    held: set[int] | None = None
    if context.optimizer is not None:
        held = {id(p) for group in context.optimizer.param_groups for p in group["params"]}
    return [n for n, p in context.parameters.items() if p.requires_grad and (held is None or id(p) in held)]


def parts_of(context: StepContext, region: Region | None, frozen: Region | None, cache: dict[Any, Any]) -> list[Part]:
    """One part by parameter: the entries of a region (``None``: all) that a step may move, without frozen ones."""
    names = tuple(moving(context))
    key = (id(frozen) if frozen is not None else None, names)
    if cache.get("key") != key:
        found = ((name, entries_left(name, context.parameters[name], region, frozen)) for name in names)
        cache.update(key=key, frozen=frozen, parts=[Part(n, 0, b) for n, b in found if b is None or b])
    return cache["parts"]


def layout_of(options: Projection, context: StepContext, cache: dict[Any, Any]) -> Layout:
    """The blocks of a step; entries that `gs.freeze` holds in it take no part."""
    names = tuple(moving(context))
    key = (id(context.frozen) if context.frozen is not None else None, names)
    if cache.get("key") != key:
        layout = build_layout(options, {n: context.parameters[n] for n in names}, context.frozen)
        cache.update(key=key, layout=layout, frozen=context.frozen)  # holds what the id is of
    return cache["layout"]


def build_layout(options: Projection, parameters: dict[str, nn.Parameter], frozen: Region | None) -> Layout:
    chosen: Iterable[Region | None] = options.regions() or (None,)
    numbers: dict[Any, int] = {}
    parts: list[Part] = []
    rows: list[Part] = []
    for k, region in enumerate(chosen):
        for name, parameter in parameters.items():
            boxes = entries_left(name, parameter, region, frozen)
            if boxes is not None and not boxes:
                continue
            if options.scope == "row" and parameter.dim() > 1:
                rows.append(Part(name, -1, boxes))
                continue
            label: Any = {"global": None, "region": k, "module": name.rpartition(".")[0]}.get(options.scope, name)
            parts.append(Part(name, numbers.setdefault(label, len(numbers)), boxes))
    return Layout(parts, rows, len(numbers))


def entries_left(name: str, parameter: nn.Parameter, region: Region | None, frozen: Region | None) -> list[Box] | None:
    """Boxes of the entries of a parameter that take part; ``None`` for all of them."""
    shape = tuple(parameter.shape)
    entries = Entries.full(shape) if region is None else region.of(name)
    if frozen is not None and name in frozen:
        entries = entries - frozen.of(name)
    return None if entries.whole else [box_columns(box, shape) for box in entries.boxes()]
