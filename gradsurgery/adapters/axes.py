"""Adapters in a weight's singular coordinates: which axes are kept, and which are the quarantine's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery.adapters.parts import CoordinatePart, Diagonal
from gradsurgery.adapters.places import Place
from gradsurgery.errors import PlanError, SelectionError


def coordinate_part(place: Place, options: Mapping[str, Any], axes: Mapping[str, Tensor] | None) -> CoordinatePart:
    """The part of one layer; ``axes`` are those that are reserved, by layer."""
    weight = place.weight_OI.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    rank = options["rank"] or left.shape[1]
    left, right = left[:, :rank].contiguous(), right[:rank].contiguous()
    if axes is not None:
        if place.path not in axes:
            raise SelectionError(f"adapters: no axes are reserved at {place.path}; give them for every layer.")
        chosen = axes[place.path].detach().to("cpu", torch.promote_types(axes[place.path].dtype, torch.float32))
        kept, quarantined = split_axes(chosen, rank, place.path)
    elif options["reserved"]:
        reserved = torch.linspace(0, rank - 1, options["quarantine_rank"] + 2).round().long()[1:-1].unique()
        reserved = (
            reserved
            if len(reserved) == options["quarantine_rank"]
            else torch.arange(rank)[-options["quarantine_rank"] :]
        )
        rest = torch.ones(rank, dtype=torch.bool)
        rest[reserved] = False
        kept, quarantined = rest.nonzero().flatten(), reserved
    else:
        kept = torch.arange(rank)
        quarantined = torch.arange(options["quarantine_rank"] or rank)
        if len(quarantined) > rank:
            raise PlanError(
                f"adapters: quarantine_rank={len(quarantined)} is more than the {rank} axes of rank={rank}."
            )
    return CoordinatePart(left, right, Diagonal(kept, rank), Diagonal(quarantined, rank))


def axes_of(reserved: Any) -> Mapping[str, Tensor]:
    """The axes to reserve, by layer: of a direction, or as given."""
    found = getattr(reserved, "axes", reserved)
    if not isinstance(found, Mapping) or not found:
        raise PlanError(
            f"adapters: reserved is True, a direction, or axes [k, rank] by layer, not {type(reserved).__name__}."
        )
    return found


def split_axes(axes_KR: Tensor, rank: int, path: str) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the complement of some axes, and one of the axes."""
    if axes_KR.dim() != 2 or axes_KR.shape[1] != rank or not 0 < axes_KR.shape[0] < rank:
        raise SelectionError(
            f"adapters: axes reserved at {path} are {list(axes_KR.shape)}; there are {rank} coordinates, and some "
            f"must stay."
        )
    basis, triangle = torch.linalg.qr(axes_KR.T.double(), mode="complete")
    count = axes_KR.shape[0]
    if triangle.diagonal()[:count].abs().min() <= 1e-6 * triangle.abs().max():
        raise SelectionError(f"adapters: the axes reserved at {path} are linearly dependent, or zero.")
    basis = basis.T.to(axes_KR.dtype)
    return basis[count:].contiguous(), basis[:count].contiguous()
