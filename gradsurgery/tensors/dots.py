"""Inner products and combinations of large vectors, streamed; plain tensors and DTensors alike.

A vector lies in pieces: flat local tensors, in one order for all vectors. Sums are fp32 within a block that fits the
cache where that is safe, and fp64 everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.tensors.boxes import Box, gather, is_sharded, put_

BLOCK = {"cpu": 1 << 15}  # entries: two fp32 blocks fit a core's own cache
LARGE = 1 << 22
SAFE = (1e-24, 1e37)  # sums of squares of a block in which fp32 loses nothing to under- or overflow
SCALARS = (1e-30, 1e30)  # factors that fp32 holds, times whatever entry


class Difference(NamedTuple):
    """``after - before`` as a vector that is never stored, in fp64."""

    after: Tensor
    before: Tensor


Flat = Tensor | Difference


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def aligned(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` on the device of ``like`` and laid out over ranks as it is; the tensor itself where it fits."""
    if not is_sharded(like):
        return (tensor.full_tensor() if is_sharded(tensor) else tensor).to(like.device)  # type: ignore[attr-defined]
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if is_sharded(tensor):
        same = tensor.device_mesh == mesh and tensor.placements == placements  # type: ignore[attr-defined]
        return tensor if same else tensor.redistribute(mesh, placements)  # type: ignore[attr-defined]
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dim, min(start, tensor.shape[dim]), length)
    mine = tensor.to(like.device).contiguous()
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, which every rank has whole, on the device and of the dtype of ``like``, fit to compute with it."""
    tensor = tensor.to(device=like.device, dtype=like.dtype)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def pieces(tensor: Tensor, boxes: Sequence[Box] | None = None) -> list[Tensor]:
    """The local entries, flat: of the whole tensor (a view where it is contiguous), or copies of those in boxes."""
    if boxes is None:
        return [local_of(tensor).reshape(-1)]
    return [part.reshape(-1) for part in gather(tensor, boxes)]


def inner_products(vectors: Sequence[Flat | None]) -> Tensor:
    """The Gram matrix of some flat vectors of one length; ``None`` is zero.

    Returns:
        ``[vectors, vectors]``, fp64, on their device.
    """
    first = next(v for v in vectors if v is not None)
    device = first.device if isinstance(first, Tensor) else first.after.device
    given = [v for v in vectors if v is not None]
    # of three and more, small differences may matter: fp64 throughout
    if device.type == "cpu" and len(vectors) <= 2 and all(_is_narrow(v) for v in given):
        found = torch.tensor(_fast(*given), dtype=torch.float64)  # type: ignore[arg-type]
    else:
        found = torch.zeros(len(given), len(given), dtype=wide(device), device=device)
        size = BLOCK.get(device.type, LARGE)
        for blocks in zip(*(_blocks(v, size) for v in given), strict=True):
            rows = torch.stack([block.to(found.dtype) for block in blocks])
            found += rows @ rows.T
    if len(given) == len(vectors):
        return found
    out = found.new_zeros(len(vectors), len(vectors))
    at = torch.tensor([k for k, v in enumerate(vectors) if v is not None], device=device)
    out[at[:, None], at] = found
    return out


def wide(device: torch.device) -> torch.dtype:
    """The widest type that a device computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


def _is_narrow(vector: Flat) -> bool:
    return isinstance(vector, Tensor) and vector.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _blocks(vector: Flat, size: int) -> Iterator[Tensor]:
    if isinstance(vector, Tensor):
        yield from vector.split(size)
        return
    to = wide(vector.after.device)
    for after, before in zip(vector.after.split(size), vector.before.split(size), strict=True):
        yield after.to(to) - before.to(to)


def _fast(a: Tensor, b: Tensor | None = None) -> list[list[float]]:
    """Blocks that fit the cache are read once for all three products; the few that fp32 cannot hold go through fp64."""
    size = BLOCK["cpu"]
    aa = ab = bb = 0.0
    low, high = SAFE
    for x, y in zip(a.split(size), (a if b is None else b).split(size), strict=True):
        x, y = x.float(), y.float()
        xx, yy, xy = x.dot(x).item(), y.dot(y).item(), x.dot(y).item()
        if not (low < xx < high and low < yy < high):
            x, y = x.double(), y.double()
            xx, yy, xy = x.dot(x).item(), y.dot(y).item(), x.dot(y).item()
        aa, ab, bb = aa + xx, ab + xy, bb + yy
    return [[aa]] if b is None else [[aa, ab], [ab, bb]]


def row_products(vectors: Sequence[Tensor | Difference | None]) -> Tensor:
    """The Gram matrix of every row of some matrices ``[rows, …]``: ``[rows, vectors, vectors]``, fp64."""
    first = next(v for v in vectors if v is not None)
    like = first if isinstance(first, Tensor) else first.after
    rows, width, to = like.shape[0], math.prod(like.shape[1:]), wide(like.device)
    out = torch.zeros(rows, len(vectors), len(vectors), dtype=to, device=like.device)
    step = max(BLOCK.get(like.device.type, LARGE) // max(width, 1), 1)
    at = [k for k, v in enumerate(vectors) if v is not None]
    for start in range(0, rows, step):
        stacked = torch.stack([_rows(v, start, step, to) for v in vectors if v is not None], 1)
        block = out[start : start + step]
        block[:, torch.tensor(at)[:, None], torch.tensor(at)] = stacked @ stacked.mT
    return out


def _rows(vector: Flat, start: int, step: int, to: torch.dtype) -> Tensor:
    if isinstance(vector, Tensor):
        return vector[start : start + step].to(to).reshape(min(step, vector.shape[0] - start), -1)
    return _rows(vector.after, start, step, to) - _rows(vector.before, start, step, to)


def subtract_(target: Tensor, vectors: Sequence[Tensor], factors: Sequence[float], keep: float = 1.0) -> None:
    """``target <- keep * target - sum_k factors[k] * vectors[k]`` in place, rounded once.

    Args:
        target: Local tensor of any shape.
        vectors: Tensors of that shape.
        factors: One by vector, finite.
        keep: What ``target`` counts.
    """
    used = [(v, f) for v, f in zip(vectors, factors, strict=True) if f]
    if not used and keep == 1.0:
        return
    tame = all(SCALARS[0] < abs(f) < SCALARS[1] for _, f in used)
    types = {target.dtype, *(v.dtype for v, _ in used)}
    if keep == 1.0 and len(used) == 1 and (types == {torch.float64} or (types == {torch.float32} and tame)):
        target.add_(used[0][0], alpha=-used[0][1])  # of bf16, torch would round the factor to bf16 too
        return
    narrow = types <= {torch.bfloat16, torch.float16} and len(used) < 2
    to = torch.float32 if tame and narrow else wide(target.device)
    flat = target.view(-1) if target.is_contiguous() else target
    parts = [v.reshape(flat.shape) for v, _ in used]
    size = BLOCK.get(target.device.type, LARGE) if flat.dim() == 1 else max(flat.shape[0], 1)
    for blocks in zip(flat.split(size), *(p.split(size) for p in parts), strict=True):
        total = blocks[0].to(to) * keep
        for block, (_, factor) in zip(blocks[1:], used, strict=True):
            total.add_(block.to(total.dtype), alpha=-factor)
        blocks[0].copy_(total)


def subtract_rows_(target: Tensor, vectors: Sequence[Tensor], factors: Tensor, keep: float = 1.0) -> None:
    """`subtract_` with factors by row: ``target`` ``[rows, …]``, ``factors`` ``[rows, vectors]``."""
    rows, width, to = target.shape[0], math.prod(target.shape[1:]), wide(target.device)
    factors = factors.to(target.device, to)
    step = max(BLOCK.get(target.device.type, LARGE) // max(width, 1), 1)
    for start in range(0, rows, step):
        part = target[start : start + step]
        total = part.to(to) * keep
        for k, vector in enumerate(vectors):
            factor = factors[start : start + step, k].reshape(-1, *[1] * (target.dim() - 1))
            total -= factor * vector[start : start + step].to(to)
        part.copy_(total)


def in_boxes_only(tensor: Tensor, boxes: Sequence[Box]) -> Tensor:
    """A copy that is zero outside of the boxes."""
    out = torch.zeros_like(tensor)
    put_(out, boxes, gather(tensor, boxes))
    return out


def shards_of(tensor: Tensor) -> tuple[Any, tuple[int, ...]]:
    """``(mesh, mesh dimensions that the tensor is dealt out over)``; ``(None, ())`` for plain tensors."""
    if not is_sharded(tensor):
        return None, ()
    dims = (m for m, placement in enumerate(tensor.placements) if placement.is_shard())  # type: ignore[attr-defined]
    return tensor.device_mesh, tuple(dims)  # type: ignore[attr-defined]


def all_reduce_(value: Tensor, mesh: Any, dims: Sequence[int]) -> Tensor:
    """Sum a tensor over the ranks of some mesh dimensions, in place."""
    for dim in dims:
        torch.distributed.all_reduce(value, group=mesh.get_group(dim))
    return value
