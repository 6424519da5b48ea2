"""Which part of a matrix ``A [stack,] r, c`` a rank holds, for plain tensors and DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gradsurgery.errors import PlanError
from gradsurgery.estimators.matrices import Layout
from gradsurgery.tensors import is_sharded


@dataclass(frozen=True)
class Part:
    """The rank's own part.

    Attributes:
        slices: Of the parameter, by dimension.
        stack, rows, columns: Of ``A``; ``columns`` are those that the basis is of.
        groups: Process groups over which the columns are dealt out: coordinates are summed over them.
    """

    slices: tuple[slice, ...]
    stack: slice
    rows: slice
    columns: slice
    groups: tuple[Any, ...] = ()

    def sum_(self, coordinates: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(coordinates, group=group)
        return coordinates


def local(tensor: Tensor) -> Tensor:
    """The tensor that this rank holds, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(parameter: Tensor, layout: Layout, side: str, name: str) -> Part:
    """How this rank's part of a weight meets its matrix.

    Raises:
        PlanError: a sharding under which coordinates cannot be taken where the weight lies.
    """
    whole = slice(None)
    plain = Part((whole,) * parameter.dim(), whole, whole, whole)
    if not is_sharded(parameter):
        return plain
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements: Sequence[Any] = parameter.placements  # type: ignore[attr-defined]
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    sharded = [p.dim % parameter.dim() for p in placements if p.is_shard()]
    strange = any(p.is_partial() or type(p).__name__ == "_StridedShard" for p in placements)
    if (
        strange
        or len(set(sharded)) < len(sharded)
        or (layout.kind == "conv" and (layout.groups > 1 or set(sharded) - {0}))
    ):
        raise PlanError(
            f"rotate: {name} is laid out as {tuple(placements)}, in which its coordinates cannot be taken; shard it "
            f"along one dimension (fully_shard over one mesh dimension), convolutions along their output channels."
        )
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    slices = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    if layout.kind == "conv":
        outputs, inputs, stack = slices[0], whole, whole
    else:
        outputs, inputs = slices[-2:][::-1] if layout.transposed else slices[-2:]
        stack = slices[0] if parameter.dim() == 3 else whole
    rows, columns = (outputs, inputs) if side == "input" else (inputs, outputs)
    place = 0 if layout.kind == "conv" else parameter.dim() - (2 if layout.transposed == (side == "input") else 1)
    contracted = 0 if layout.kind == "conv" and side == "output" else -1 if layout.kind == "conv" else place
    groups = tuple(mesh.get_group(m) for m, p in enumerate(placements) if p.is_shard() and p.dim == contracted)
    return Part(slices, stack, rows, columns, groups)
