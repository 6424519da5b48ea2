"""Gram matrices of blocks: local sums, one reduction a mesh, one transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.tensors import all_reduce_, inner_products, row_products, shards_of
from gradsurgery.tensors.dots import Flat
from gradsurgery.transforms.projection.layout import Part

Columns = Callable[[Part], "list[list[Flat] | None]"]


def part_products(parts: Sequence[Part], columns: Columns, count: int, parameters: Mapping[str, Tensor]) -> Tensor:
    """Gram matrices of the parts, over all ranks.

    Args:
        parts: Parts of parameters, the same on every rank.
        columns: The flat pieces of every vector on a part; ``None`` where a vector has no such entries.
        count: Number of vectors.
        parameters: Say how parts are dealt out over ranks.

    Returns:
        ``[parts, count, count]``, fp64, on the host.
    """

    def products(part: Part) -> Tensor:
        return _products(columns(part), count, parameters[part.name].device)

    return over_shards(parts, products, count * count, parameters).view(-1, count, count)


def over_shards(
    parts: Sequence[Part], local: Callable[[Part], Tensor], count: int, parameters: Mapping[str, Tensor]
) -> Tensor:
    """Sum ``count`` local figures of each part over the ranks it is dealt out over: ``[parts, count]``, on the host."""
    groups: dict[Any, list[int]] = {}
    for k, part in enumerate(parts):
        parameter = parameters[part.name]
        groups.setdefault((parameter.device, *shards_of(parameter)), []).append(k)
    out = torch.zeros(len(parts), count, dtype=torch.float64)
    for (device, mesh, dims), members in groups.items():
        sums = torch.stack([local(parts[k]).reshape(count) for k in members]).to(device)
        out[members] = all_reduce_(sums, mesh, dims).to("cpu", torch.float64)
    return out


def _products(columns: list[list[Flat] | None], count: int, device: torch.device) -> Tensor:
    total = torch.zeros(count, count, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    given = [c for c in columns if c is not None]
    for k in range(len(given[0]) if given else 0):
        total += inner_products([None if c is None else c[k] for c in columns])
    return total


def row_blocks(
    parts: Sequence[Part], columns: Callable[[Part], list[Any]], count: int, parameters: Mapping[str, Tensor]
) -> list[Tensor]:
    """Gram matrices of every row that this rank holds a part of, ``[rows, count, count]`` by part, on the host.

    Rows whose entries lie on several ranks are summed over them, in one reduction a mesh.
    """
    out: list[Tensor | None] = [None] * len(parts)
    groups: dict[Any, list[int]] = {}
    for k, part in enumerate(parts):
        parameter = parameters[part.name]
        mesh, dims = shards_of(parameter)
        across = tuple(m for m in dims if parameter.placements[m].dim > 0)  # type: ignore[attr-defined]
        groups.setdefault((parameter.device, mesh if across else None, across), []).append(k)
    for (device, mesh, across), members in groups.items():
        found = []
        for k in members:
            vectors = columns(parts[k])
            rows = _local_rows(parameters[parts[k].name])
            empty = torch.zeros(rows, count, count, dtype=torch.float64, device=device)
            found.append(row_products(vectors) if any(v is not None for v in vectors) else empty)
        joined = all_reduce_(torch.cat(found), mesh, across).to("cpu", torch.float64)
        for k, rows in zip(members, joined.split([len(f) for f in found]), strict=True):
            out[k] = rows
    return [rows for rows in out if rows is not None]


def ranks_across(parameter: Tensor) -> int:
    """Over how many ranks each row of a parameter is dealt out."""
    mesh, dims = shards_of(parameter)
    ranks = 1
    for m in dims:
        ranks *= mesh.size(m) if parameter.placements[m].dim > 0 else 1  # type: ignore[attr-defined]
    return ranks


def _local_rows(parameter: Tensor) -> int:
    return int(getattr(parameter, "_local_tensor", parameter).shape[0])


def over_all_rows(rows: Sequence[Tensor], parts: Sequence[Part], parameters: Mapping[str, Tensor]) -> Tensor:
    """Sums of something by row, ``[rows, …]``, over the rows of each part, other ranks' too: ``[parts, …]``."""
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    out = torch.zeros(len(parts), *rows[0].shape[1:], dtype=torch.float64)
    groups: dict[Any, list[int]] = {}
    for k, part in enumerate(parts):
        parameter = parameters[part.name]
        mesh, dims = shards_of(parameter)
        along = tuple(m for m in dims if parameter.placements[m].dim == 0)  # type: ignore[attr-defined]
        groups.setdefault((parameter.device, mesh if along else None, along), []).append(k)
    for (device, mesh, along), members in groups.items():
        sums = torch.stack([rows[k].to(torch.float64).sum(0) for k in members]).to(device)
        out[members] = all_reduce_(sums, mesh, along).cpu()
    return out
