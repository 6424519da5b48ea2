"""Values of some entries of one parameter, kept flat beside it and exchanged with it in place, in parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradsurgery.anatomy.entries import Entries
from gradsurgery.tensors import Box, Indices, gather, is_sharded, local_part, put_
from gradsurgery.transforms.engine.program import box_columns

PART, PART_ON_DEVICE = 1 << 18, 1 << 22
"""Entries that are exchanged at a time: on the CPU what stays in cache."""


class Kept:
    """Entries of a parameter (of a sharded one: of its local part) as they were once.

    Args:
        parameter: The parameter, a plain tensor or a DTensor.
        entries: Which of its entries.
    """

    def __init__(self, parameter: Tensor, entries: Entries) -> None:
        self.entries = entries
        self.layout = layout_of(parameter)
        local, boxes = local_part(parameter.data, _boxes(entries))
        limit = PART if local.device.type == "cpu" else PART_ON_DEVICE
        self._parts = [(part, _size(part)) for box in boxes for part in _split(box, limit)]
        self.values = torch.empty(sum(size for _, size in self._parts), dtype=local.dtype, device=local.device)
        for box, values in self._views():
            values.copy_(gather(local, [box])[0])

    def _views(self) -> Iterator[tuple[Box, Tensor]]:
        start = 0
        for box, size in self._parts:
            yield box, self.values[start : start + size].view([len(indices) for indices in box])
            start += size

    def exchange_(self, parameter: Tensor, most: int | None = None) -> Iterator[int]:
        """Swap the (first ``most``) parts with the parameter's entries, one each time; yields how many are swapped.

        Through ``.data``, since what comes back bit for bit need not trip the version counters of pending graphs.
        """
        local, _ = local_part(parameter.data, ())
        for number, (box, values) in enumerate(itertools.islice(self._views(), most), start=1):
            live = gather(local, [box])
            put_(local, [box], [values])
            values.copy_(live[0])
            yield number

    def all_values(self, parameter: Tensor) -> Tensor:
        """The values of the whole parameter; of a sharded one they are gathered, on all ranks."""
        if not is_sharded(parameter):
            return self.values
        from torch.distributed.tensor import DTensor

        local = torch.zeros_like(parameter.to_local())  # type: ignore[attr-defined]
        for box, values in self._views():
            put_(local, [box], [values])
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        whole = DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())
        return torch.cat([part.reshape(-1) for part in gather(whole.full_tensor(), _boxes(self.entries))])

    def set_(self, parameter: Tensor, values: Tensor) -> None:
        """Keep these values, of the whole parameter, instead."""
        if not is_sharded(parameter):
            self.values.copy_(values)
            return
        from torch.distributed.tensor import distribute_tensor

        whole = torch.zeros(parameter.shape, dtype=self.values.dtype, device=self.values.device)
        boxes = _boxes(self.entries)
        sizes = [_size(box) for box in boxes]
        parts = values.to(whole.device).split(sizes)
        put_(whole, boxes, [v.view([len(i) for i in box]) for v, box in zip(parts, boxes, strict=True)])
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        local = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
        for box, kept in self._views():
            kept.copy_(gather(local, [box])[0])


def layout_of(parameter: Tensor) -> tuple[Any, ...]:
    """How a parameter is stored here: what values kept beside it depend on, the device left out."""
    if not is_sharded(parameter):
        return (str(parameter.dtype), tuple(parameter.shape))
    local: Tensor = parameter.to_local()  # type: ignore[attr-defined]
    return (str(parameter.dtype), tuple(local.shape), str(parameter.placements))  # type: ignore[attr-defined]


def _boxes(entries: Entries) -> list[Box]:
    return [box_columns(box, entries.shape) for box in entries.boxes()]


def _size(box: Box) -> int:
    size = 1
    for indices in box:
        size *= len(indices)
    return size


def _split(box: Box, limit: int) -> Iterator[Box]:
    """A box in parts of about ``limit`` entries, cut along dimension 0."""
    step = max(1, limit * len(box[0]) // _size(box)) if box else 0
    if not box or step >= len(box[0]):
        yield box
        return
    for start in range(0, len(box[0]), step):
        yield (Indices(box[0].indices[start : start + step], box[0].size), *box[1:])
