"""Permuting, zeroing and randomising the slots of units in place, on the replica only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .draft import Slot


def _mesh(slot: Slot, units: Tensor) -> tuple[list[int], tuple[Tensor, ...]]:
    """Dimensions of a slot, and open index grids ``[units, width, …]`` over them."""
    dims = sorted(slot.index)
    grids = []
    for place, dim in enumerate(dims):
        rows = torch.from_numpy(slot.index[dim])[units]
        shape = [len(units)] + [1] * len(dims)
        shape[place + 1] = rows.shape[1]
        grids.append(rows.reshape(shape))
    return dims, tuple(grids)


def _front(tensor: Tensor, dims: list[int]) -> Tensor:
    return tensor.movedim(dims, list(range(len(dims))))


@torch.no_grad()
def permute_(tensors: dict[str, Tensor], slots: Iterable[Slot], order: Tensor) -> None:
    """Unit ``i`` becomes what unit ``order[i]`` was."""
    moved = torch.nonzero(order != torch.arange(len(order))).flatten()
    for slot in slots:
        if not isinstance(slot.name, str):
            old = {int(u): tensors[slot.name[u]].clone() for u in moved}
            for unit in moved.tolist():
                tensors[slot.name[unit]].copy_(old[int(order[unit])])
            continue
        if not slot.index:
            continue
        dims, here = _mesh(slot, moved)
        _, there = _mesh(slot, order[moved])
        view = _front(tensors[slot.name], dims)
        view[here] = view[there].clone()


@torch.no_grad()
def fill_(tensors: dict[str, Tensor], slots: Iterable[Slot], units: Tensor, noise: torch.Generator | None) -> None:
    """Zero the slots of ``units``, or replace them by noise of their own size."""
    for slot in slots:
        names = [slot.name] if isinstance(slot.name, str) else [slot.name[int(u)] for u in units]
        for name in names:
            dims, here = _mesh(slot, units) if isinstance(slot.name, str) else ([], ())
            view = _front(tensors[name], dims) if dims else tensors[name]
            old = view[here] if dims else view
            if noise is None:
                new = torch.zeros_like(old)
            else:
                spread = torch.randn(old.shape, generator=noise, dtype=old.dtype).abs()  # variances stay positive
                new = old + spread * old.abs().mean().clamp_min(0.1)
            if dims:
                view[here] = new
            else:
                view.copy_(new)


def unit_values(tensors: dict[str, Tensor], slots: Iterable[Slot], count: int) -> Tensor:
    """Per unit, the largest magnitude in any of its slots."""
    found = [torch.zeros(count, dtype=torch.float64)]
    for slot in slots:
        if not isinstance(slot.name, str):
            found.append(torch.stack([tensors[name].abs().max() for name in slot.name]).double())
        elif slot.index:
            dims, grid = _mesh(slot, torch.arange(count))
            found.append(_front(tensors[slot.name], dims)[grid].abs().reshape(count, -1).amax(1).double())
        else:
            found.append(tensors[slot.name].abs().max().double().expand(count))
    return torch.stack(found).amax(0)


@contextmanager
def restored(tensors: dict[str, Tensor], slots: Iterable[Slot]) -> Iterator[None]:
    """Put the tensors of the slots back afterwards."""
    names = {n for s in slots for n in ([s.name] if isinstance(s.name, str) else s.name)}
    saved = {name: tensors[name].detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in saved.items():
                tensors[name].copy_(values)
