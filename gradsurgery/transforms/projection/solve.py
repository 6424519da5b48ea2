"""How much of each reference to remove, from the Gram matrix of a block; on the host, in fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradsurgery.transforms.projection.options import Projection

RELATIVE = 1e-13
"""Eigenvalues below this share of the largest are rounding: directions that the references do not have."""


def coefficients(gram: Tensor, options: Projection, sign: int, nothing: float) -> Tensor:
    """``s`` in ``g' = g - sum_i s_i r_i``, block by block.

    Args:
        gram: ``[blocks, 1 + references, 1 + references]``, first the vector that is projected.
        options: Which part to remove.
        sign: 1 if a conflict is ``<g, r> < 0`` (gradients), -1 if it is ``<g, r> > 0`` (updates).
        nothing: Cosines up to this one are rounding, and count as zero.

    Returns:
        ``[blocks, references]``, fp64.
    """
    norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    g, r = norms[:, 0], norms[:, 1:]
    there = (r > 0) & (r > options.floor * g[:, None])
    side = {"both": 0, "conflict": sign, "agreement": -sign}[options.remove]
    if r.shape[1] == 1:
        return _away_from_one(gram, g, r[:, 0], there[:, 0], options, side, nothing)[:, None]
    # unit references: they may differ by many orders of magnitude
    scale = torch.where(there, 1 / r.clamp(min=torch.finfo(r.dtype).tiny), 0.0)
    c = gram[:, 0, 1:] * scale
    c = torch.where((c.abs() <= nothing * g[:, None]).all(1, True), 0.0, c)
    unit = gram[:, 1:, 1:] * scale[:, :, None] * scale[:, None, :]
    if side:
        parts = [-side * non_negative(matrix, -side * wanted) for matrix, wanted in zip(unit, c, strict=True)]
        return torch.stack(parts) * scale if parts else c
    if options.energy < 1:
        return _onto_span(
            gram[:, 1:, 1:] * there[:, :, None] * there[:, None, :], gram[:, 0, 1:] * there, options.energy
        )
    return _onto_span(unit, c, 1.0) * scale


def along(gram: Tensor) -> Tensor:
    """Norm of the part of the first vector in the span of the others; with one other, its signed length along it."""
    r = gram.diagonal()[1:].clamp(min=0).sqrt()
    scale = torch.where(r > 0, 1 / r.clamp(min=torch.finfo(r.dtype).tiny), 0.0)
    c = gram[0, 1:] * scale
    if len(c) == 1:
        return c[0]
    inside = _onto_span((gram[1:, 1:] * scale[:, None] * scale)[None], c[None], 1.0)[0]
    return (inside @ c).clamp(min=0).sqrt()


def _away_from_one(
    gram: Tensor, g: Tensor, r: Tensor, there: Tensor, options: Projection, side: int, nothing: float
) -> Tensor:
    safe = torch.where(there, r, 1.0)
    along = gram[:, 0, 1] / safe  # <g, r> / |r|: its square might overflow
    limit = options.max_cosine * g
    along = torch.where(there & (along.abs() > nothing * g), along, 0.0).clamp(-limit, limit)
    if side:
        along = along.clamp(max=0) if side > 0 else along.clamp(min=0)
    return along / safe


def _onto_span(matrix: Tensor, wanted: Tensor, energy: float) -> Tensor:
    """``R⁺ c``, over the leading eigenvectors that hold a share of the trace."""
    values, vectors = torch.linalg.eigh(matrix)  # ascending
    top = values[:, -1:].clamp(min=0)
    above = values.flip(1).clamp(min=0).cumsum(1).flip(1) - values.clamp(min=0)  # energy of the larger ones
    kept = (values > RELATIVE * matrix.shape[1] * top) & (above < energy * values.clamp(min=0).sum(1, True))
    inverse = torch.where(kept, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)
    return torch.einsum("bij,bj,bkj,bk->bi", vectors, inverse, vectors, wanted)


def non_negative(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The ``v >= 0`` with least ``v·Rv / 2 - c·v``: active sets (Lawson & Hanson 1974, chapter 23) on the Gram matrix.

    Args:
        matrix: ``R``, ``[n, n]``, positive semi-definite.
        wanted: ``c``, ``[n]``.
    """
    n = len(wanted)
    v, free = torch.zeros_like(wanted), torch.zeros(n, dtype=torch.bool)
    level = RELATIVE * n * max(float(wanted.abs().max()), 1e-300) if n else 0.0
    for _ in range(10 * n):
        pull = torch.where(free, -torch.inf, wanted - matrix @ v)
        best = int(pull.argmax())
        if not pull[best] > level:
            break
        free[best] = True
        while True:
            at = free.nonzero()[:, 0]
            inner = torch.zeros_like(v)
            inner[at] = torch.linalg.lstsq(matrix[at][:, at], wanted[at, None], driver="gelsd").solution[:, 0]
            if (inner[at] > 0).all():
                v = inner
                break
            out = free & (inner <= 0)
            step = (v[out] / (v[out] - inner[out]).clamp(min=1e-300)).min().clamp(0, 1)
            v = v + step * (inner - v)
            dropped = free & (v <= level) & (inner <= 0)
            if not dropped.any():
                dropped = out & (v == v[out].min())
            free = free & ~dropped
            v = torch.where(free, v, 0.0)
            if not free.any():
                break
        if not free[best]:  # rounding: what came in goes straight out again
            break
    return v
