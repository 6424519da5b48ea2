"""Weights as identity-forward functions of themselves, whose backward masks or scales the gradient of some entries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.tensors import Indices, fill_, gather, put_, scale_
from gradsurgery.transforms.engine.program import Atom

Changes = list[tuple[list[tuple[Indices, ...]], float]]


class _AdjointEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, changes: Changes) -> Tensor:  # type: ignore[override]
        ctx.changes = changes
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def, override]
        grad = grad.clone()
        for boxes, factor in ctx.changes:
            scale_(grad, boxes, factor)
        return grad, None


def changes_of(atoms: list[Atom], code: int, passes: int) -> Changes:
    """What rows of class ``code`` do to the gradient of a parameter; empty where they do nothing."""
    factors = [(atom.boxes, atom.factor(code, passes)) for atom in atoms]
    return [(boxes, factor) for boxes, factor in factors if factor != 1.0]


def under_adjoint(weight: Tensor, changes: Changes) -> Tensor:
    return _AdjointEntries.apply(weight, changes) if changes else weight


Boxes = list[tuple[Indices, ...]]


class _Cut(torch.autograd.Function):
    """Some entries of a tensor at zero, value and gradient alike."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, boxes: Boxes) -> Tensor:  # type: ignore[override]
        ctx.boxes = boxes
        out = weight.clone()
        fill_(out, boxes, 0.0)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def, override]
        grad = grad.clone()
        fill_(grad, ctx.boxes, 0.0)
        return grad, None


class _Only(torch.autograd.Function):
    """All but some entries of a tensor at zero, value and gradient alike."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, boxes: Boxes) -> Tensor:  # type: ignore[override]
        ctx.boxes = boxes
        return _copy_only(weight, boxes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def, override]
        return _copy_only(grad, ctx.boxes), None


def _copy_only(tensor: Tensor, boxes: Boxes) -> Tensor:
    out = torch.zeros_like(tensor)
    put_(out, boxes, gather(tensor, boxes))
    return out


def without_entries(weight: Tensor, boxes: Boxes) -> Tensor:
    """``weight`` with some entries at zero; they receive no gradient."""
    return _Cut.apply(weight, boxes)


def only_entries(weight: Tensor, boxes: Boxes, but: Boxes) -> Tensor:
    """Zero but for some entries of ``weight`` (without ``but``); the others receive no gradient."""
    return _Cut.apply(_Only.apply(weight, boxes), but)


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module, or under a dotted name of one of its children."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path)._parameters[attribute]


def set_parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Let a module read ``value`` as its parameter, without registering anything."""
    path, _, attribute = name.rpartition(".")
    module.get_submodule(path)._parameters[attribute] = value  # type: ignore[assignment]


@contextmanager
def swapped(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """The module reads ``weights`` instead of its own parameters inside the block."""
    saved = {name: parameter_of(module, name) for name in weights}
    try:
        for name, weight in weights.items():
            set_parameter(module, name, weight)
        yield
    finally:
        for name, parameter in saved.items():
            set_parameter(module, name, parameter)
