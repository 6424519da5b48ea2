"""What the transforms of one pass mean for one module: atoms of weight entries and edits of the input.

An atom is a largest set of entries that all effects treat alike; its factor depends only on a row's class.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from gradsurgery.anatomy.entries import Box, Entries, indices_of
from gradsurgery.tensors import Indices
from gradsurgery.transforms.base import InputEffect, WeightEffect, Where

Factor = tuple[int, "float | str"]
"""``(column, factor)``: rows that label column ``column`` flags count ``factor`` times; column -1 flags every row."""


_SHARED: weakref.WeakValueDictionary[tuple[int, int], Indices] = weakref.WeakValueDictionary()
"""Index tensors in use: most boxes of a model take whole dimensions of a few sizes."""


def box_columns(box: Box, shape: tuple[int, ...]) -> tuple[Indices, ...]:
    out = []
    for bits, n in zip(box, shape, strict=True):
        if (found := _SHARED.get((bits, n))) is None:
            _SHARED[bits, n] = found = Indices(torch.from_numpy(indices_of(bits)), n)
        out.append(found)
    return tuple(out)


@dataclass(eq=False)
class Atom:
    """Entries of one parameter under the same factors."""

    entries: Entries
    factors: tuple[Factor, ...]
    boxes: list[tuple[Indices, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.boxes = [box_columns(box, self.entries.shape) for box in self.entries.boxes()]

    @cached_property
    def tensor_box(self) -> tuple[Indices, ...]:
        """All entries of the parameter."""
        return tuple(Indices(torch.arange(n), n) for n in self.entries.shape)

    def factor(self, code: int, passes: int) -> float:
        """What rows of class ``code`` count for these entries, in a step of ``passes`` passes."""
        out = 1.0
        for column, value in self.factors:
            if column < 0 or code >> column & 1:
                out *= value if not isinstance(value, str) else passes if value == "passes" else 1.0 / passes
        return out


@dataclass(frozen=True, eq=False)
class InputEdit:
    """Flagged rows of some input features are zeroed or detached."""

    entries: Entries
    kind: Literal["zero", "detach"]
    column: int


@dataclass(eq=False)
class Program:
    """All effects of a pass on one module.

    Attributes:
        path: The module's path, for messages.
        wheres: The label columns that the effects name, in the order of the flag bits.
        atoms: Per own parameter attribute, its atoms (all of its entries).
        edits: Edits of what the consumer ``attribute`` reads.
    """

    path: str
    wheres: tuple[Where, ...]
    atoms: dict[str, list[Atom]]
    edits: dict[str, list[InputEdit]]

    @property
    def per_row(self) -> bool:
        return bool(self.wheres)


def build_program(
    path: str, effects: Sequence[tuple[str, WeightEffect | InputEffect]], zeros_are_atoms: bool = False
) -> Program:
    """The program of a module from ``(attribute, effect)`` pairs.

    ``zeros_are_atoms``: the layer keeps its input as it is, so a zeroed feature also is a weight column of factor 0.
    """
    wheres: list[Where] = []
    weights: dict[str, list[tuple[Entries, Factor]]] = {}
    edits: dict[str, list[InputEdit]] = {}
    for attribute, effect in effects:
        column = _column(wheres, effect.where)
        if isinstance(effect, WeightEffect):
            weights.setdefault(attribute, []).append((effect.entries, (column, effect.factor)))
        else:
            edits.setdefault(attribute, []).append(InputEdit(effect.entries, effect.kind, column))
            if effect.kind == "zero" and zeros_are_atoms:
                weights.setdefault(attribute, []).append((effect.entries, (column, 0.0)))
    atoms = {attribute: partition(parts) for attribute, parts in weights.items()}
    return Program(path, tuple(wheres), atoms, edits)


def _column(wheres: list[Where], where: Where) -> int:
    if where is None:
        return -1
    for i, known in enumerate(wheres):
        if known is where or (isinstance(known, str) and isinstance(where, str) and known == where):
            return i
    wheres.append(where)
    return len(wheres) - 1


def partition(parts: Sequence[tuple[Entries, Factor]]) -> list[Atom]:
    """Split a parameter into atoms, largest first."""
    cells: dict[tuple[Factor, ...], Entries] = {(): Entries.full(parts[0][0].shape)}
    for entries, factor in parts:
        split: dict[tuple[Factor, ...], Entries] = {}
        for factors, cell in cells.items():
            for key, piece in (((*factors, factor), cell & entries), (factors, cell - entries)):
                if piece:
                    split[key] = split[key] | piece if key in split else piece
        cells = split
    return sorted((Atom(e, f) for f, e in cells.items()), key=lambda atom: -atom.entries.numel())
