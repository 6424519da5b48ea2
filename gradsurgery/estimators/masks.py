"""Masks over rotated coordinates, and their set algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import ArtefactError, PlanError, SelectionError
from gradsurgery.estimators.artefacts import read, require_basis, write
from gradsurgery.estimators.basis import Basis
from gradsurgery.estimators.bits import packed, unpacked


@dataclass(frozen=True, eq=False)
class Masks(Mapping[str, Tensor]):
    """For weights of a basis which of their rotated coordinates are meant; `top_k` makes them.

    ``a | b`` is what either task needs, ``a & b`` what both do, ``a - b`` what the first needs and the second does not,
    ``~a`` the others. Kept at one bit an entry.

    Attributes:
        basis: The basis that the coordinates are of.
        shapes: By name: ``basis.rotated_shape(name)``, or with 1 along whole rows or columns.
        bits: uint8 by name.
        about: How they were made.
    """

    basis: Basis
    shapes: Mapping[str, tuple[int, ...]]
    bits: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, basis: Basis, masks: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> Masks:
        """Masks from bool tensors by parameter name: of ``basis.rotated_shape(name)``, with 1 along whole rows or
        columns, or ``[k]`` for whole directions of the basis.

        Raises:
            SelectionError: names without a basis, tensors that are not bool or do not fit.
        """
        shapes, bits = {}, {}
        for name, mask in masks.items():
            name = basis.canonical(name)
            shape = basis.rotated_shape(name)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise SelectionError(f"the mask of {name} is a bool tensor, not {given}.")
            if mask.dim() == 1:  # by direction of the basis
                mask = mask.reshape(*[1] * (len(shape) - 1), -1)
                mask = mask if basis.side == "input" else mask.mT
            fits = mask.dim() == len(shape) and all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True))
            if not fits:
                raise SelectionError(
                    f"the mask of {name} is {list(mask.shape)}; in this basis its coordinates are {list(shape)} (1 "
                    f"stands for whole rows or columns)."
                )
            shapes[name], bits[name] = tuple(mask.shape), packed(mask)
        order = [name for name in basis.sites if name in shapes]
        return cls(basis, {n: shapes[n] for n in order}, {n: bits[n] for n in order}, about or {})

    def __getitem__(self, name: str) -> Tensor:
        name = self.basis.canonical(name)
        return unpacked(self.bits[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def count(self, name: str | None = None) -> int:
        """How many coordinates are meant, of one weight or of all."""
        if name is None:
            return sum(self.count(each) for each in self)
        mask = self[name]
        stands_for = 1
        for m, n in zip(mask.shape, self.basis.rotated_shape(name), strict=True):
            stands_for *= n // m
        return int(mask.sum()) * stands_for

    @property
    def fraction(self) -> float:
        """Share of the coordinates of the weights that the masks name."""
        total = 0
        for name in self:
            size = 1
            for n in self.basis.rotated_shape(name):
                size *= n
            total += size
        return self.count() / max(total, 1)

    def _combine(self, other: Masks, op: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        if not isinstance(other, Masks):
            raise PlanError(f"masks combine with masks, not with {type(other).__name__}.")
        if other.basis is not self.basis and other.basis.digest != self.basis.digest:
            raise ArtefactError(
                "these masks are of different bases; importances of both tasks must be taken in one basis."
            )
        out = {}
        for name in {**self.shapes, **other.shapes}:
            a = self[name] if name in self.shapes else torch.zeros_like(other[name])
            b = other[name] if name in other.shapes else torch.zeros_like(a)
            out[name] = op(a, b.to(a.device))
        return Masks.of(self.basis, out)

    def __or__(self, other: Masks) -> Masks:  # type: ignore[override]
        return self._combine(other, torch.logical_or)

    def __and__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: Masks) -> Masks:
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> Masks:
        return Masks.of(self.basis, {name: ~self[name] for name in self})

    def overlap(self, other: Masks) -> float:
        """Jaccard index: what both mean, as a share of what either means."""
        either = (self | other).count()
        return (self & other).count() / either if either else 0.0

    def save(self, path: str | Path) -> None:
        """One safetensors file with a manifest, one bit an entry."""
        manifest = {"shapes": {n: list(s) for n, s in self.shapes.items()}, "about": dict(self.about)}
        write(path, "masks", self.bits, {**manifest, "basis": self.basis.digest})

    @classmethod
    def load(cls, path: str | Path, basis: Basis) -> Masks:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, damaged, or made in another basis.
        """
        manifest, bits = read(path, "masks")
        require_basis(manifest["basis"], basis, f"{path}: the masks")
        shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        if set(shapes) != set(bits) or not set(shapes) <= set(basis.sites):
            raise ArtefactError(f"{path} is damaged: it lacks masks of its manifest; make them again.")
        return cls(basis, shapes, bits, manifest["about"])

    def __repr__(self) -> str:
        return f"Masks({self.count():,} coordinates of {len(self)} weights, {100 * self.fraction:.2f}%)"
