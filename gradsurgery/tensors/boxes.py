"""Fill, scale, gather and write boxes of tensors; plain tensors and DTensors alike.

A *box* is one `Indices` per dimension, in global indices; a sharded tensor works on the part of the box that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.errors import PlanError

Box = tuple["Indices", ...]


class Indices:
    """Indices of one dimension, contiguous or not; index tensors are made once per device."""

    def __init__(self, indices: Tensor, size: int) -> None:
        self.indices, self.size = indices, size
        contiguous = indices.numel() > 0 and int(indices[-1] - indices[0]) + 1 == indices.numel()
        self.span = (int(indices[0]), int(indices[-1]) + 1) if contiguous else None
        self.whole = indices.numel() == size
        self._on: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return self.indices.numel()

    def index_on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self.indices.to(device)
        return self._on[device]

    def narrow(self, x: Tensor, dim: int) -> Tensor:
        assert self.span is not None
        return x.narrow(dim, self.span[0], self.span[1] - self.span[0])

    def take(self, x: Tensor, dim: int) -> Tensor:
        """``x`` at these indices of ``dim``: a view where they are contiguous."""
        if self.whole:
            return x
        return self.narrow(x, dim) if self.span is not None else x.index_select(dim, self.index_on(x.device))

    def within(self, start: int, stop: int) -> Indices:
        """The indices in ``[start, stop)``, counted from ``start``."""
        inside = self.indices[(self.indices >= start) & (self.indices < stop)]
        return Indices(inside - start, stop - start)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_part(tensor: Tensor, boxes: Sequence[Box]) -> tuple[Tensor, list[Box]]:
    """The local tensor and the parts of the boxes that lie in it; a plain tensor is its own local part."""
    if not is_sharded(tensor):
        return tensor, [box for box in boxes if all(len(i) for i in box)]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(p).__name__ == "_StridedShard" for p in tensor.placements):  # type: ignore[attr-defined]
        raise PlanError(
            f"a tensor is laid out as {tuple(tensor.placements)}, in which no rank holds consecutive entries of it; "  # type: ignore[attr-defined]
            f"shard it along one dimension (fully_shard over one mesh dimension)."
        )
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    out = []
    for box in boxes:
        local = tuple(i.within(o, o + n) for i, o, n in zip(box, offset, shape, strict=True))
        if all(len(i) for i in local):
            out.append(local)
    return tensor.to_local(), out  # type: ignore[attr-defined]


def _scattered(box: Box) -> list[int]:
    return [d for d, indices in enumerate(box) if indices.span is None]


def _narrowed(tensor: Tensor, box: Box) -> Tensor:
    """A view of the tensor with every contiguous dimension of the box cut to it."""
    for d, indices in enumerate(box):
        if indices.span is not None and not indices.whole:
            tensor = indices.narrow(tensor, d)
    return tensor


def _grid(box: Box, device: torch.device) -> tuple[Tensor | slice, ...]:
    """An index for several scattered dimensions of a narrowed tensor."""
    scattered = _scattered(box)
    out: list[Tensor | slice] = []
    for d, indices in enumerate(box):
        if d in scattered:
            after = len(scattered) - 1 - scattered.index(d)
            out.append(indices.index_on(device).reshape(-1, *[1] * after))
        else:
            out.append(slice(None))
    return tuple(out)


def fill_(tensor: Tensor, boxes: Sequence[Box], value: float) -> None:
    """``tensor[box] = value`` for every box (fill, not multiply: ``0 * inf`` is nan)."""
    tensor, boxes = local_part(tensor, boxes)
    for box in boxes:
        view, scattered = _narrowed(tensor, box), _scattered(box)
        if not scattered:
            view.fill_(value)
        elif len(scattered) == 1:
            view.index_fill_(scattered[0], box[scattered[0]].index_on(tensor.device), value)
        else:
            view[_grid(box, tensor.device)] = value


def scale_(tensor: Tensor, boxes: Sequence[Box], factor: float) -> None:
    """``tensor[box] *= factor`` for every box; a factor of zero fills."""
    if factor == 0.0:
        return fill_(tensor, boxes, 0.0)
    tensor, boxes = local_part(tensor, boxes)
    for box in boxes:
        if _scattered(box):
            put_(tensor, [box], [part * factor for part in gather(tensor, [box])])
        else:
            _narrowed(tensor, box).mul_(factor)
    return None


def gather(tensor: Tensor, boxes: Sequence[Box]) -> list[Tensor]:
    """Copies of the (local) entries of every box."""
    tensor, boxes = local_part(tensor, boxes)
    out = []
    for box in boxes:
        view, scattered = _narrowed(tensor, box), _scattered(box)
        if not scattered:
            out.append(view.clone())
        elif len(scattered) == 1:
            out.append(view.index_select(scattered[0], box[scattered[0]].index_on(tensor.device)))
        else:
            out.append(view[_grid(box, tensor.device)])
    return out


def put_(tensor: Tensor, boxes: Sequence[Box], values: Sequence[Tensor]) -> None:
    """Write back what `gather` took from the same boxes."""
    tensor, boxes = local_part(tensor, boxes)
    for box, value in zip(boxes, values, strict=True):
        view, scattered = _narrowed(tensor, box), _scattered(box)
        if not scattered:
            view.copy_(value)
        elif len(scattered) == 1:
            view.index_copy_(scattered[0], box[scattered[0]].index_on(tensor.device), value)
        else:
            view[_grid(box, tensor.device)] = value


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """Sum a local scalar over the ranks that ``like`` is sharded over; the value itself for plain tensors."""
    if is_sharded(like):
        value = value.clone()
        for dim, placement in enumerate(like.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=like.device_mesh.get_group(dim))  # type: ignore[attr-defined]
    return value
