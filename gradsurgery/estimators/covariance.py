"""Second moments of activations, streamed: ``C = (1/N) sum_t x_t x_t^T`` in fp32, however the model is stored."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsurgery.errors import PlanError

_BLOCKS, _SMALL = 4, 256


class Covariance:
    """Sums ``x x^T`` of rows, or of several stacks of rows side by side (convolution groups, experts).

    Half of a symmetric matrix is enough: it is added up in blocks above the diagonal, 5/8 of the work.

    Args:
        size: Width ``n`` of a row.
        stack: Number of stacks; ``None`` for one, without the dimension.
        centre: Take the mean out. Rows are counted from the first batch's mean, so that a large mean costs no digits.
        like: A tensor on the device; fp64 is kept, everything else is summed in fp32.
    """

    def __init__(self, size: int, stack: int | None, centre: bool, like: Tensor) -> None:
        lead = () if stack is None else (stack,)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.gram = torch.zeros(*lead, size, size, device=like.device, dtype=dtype)
        self.total = torch.zeros(*lead, size, device=like.device, dtype=torch.float64) if centre else None
        self.shift: Tensor | None = None
        self.count = torch.zeros(lead, dtype=torch.float64)

    def add(self, x: Tensor, at: int | None = None) -> None:
        """Count rows ``[rows, n]`` (of one stack) or ``[stack, rows, n]``."""
        x = x.to(self.gram.dtype)
        if not x.shape[-2]:
            return
        if self.total is not None:
            if self.shift is None:
                mean = x.mean(-2, keepdim=True)
                self.shift = mean if at is None else mean.expand(len(self.gram), 1, -1).clone()
            x = x - (self.shift if at is None else self.shift[at])
            total = self.total if at is None else self.total[at]
            total += x.sum(-2, dtype=torch.float64)
        gram = self.gram if at is None else self.gram[at]
        count = self.count if at is None else self.count[at]
        count += x.shape[-2]
        if gram.dim() == 3:
            gram.baddbmm_(x.mT, x)
            return
        for start, stop in _blocks(gram.shape[-1]):
            gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def reduce(self, group: Any) -> None:
        """Add up over the ranks of a process group."""
        if self.total is not None:
            raise PlanError("centre=True counts from each rank's own mean; leave it out, or give all data to one rank.")
        count = self.count.to(self.gram.device)
        dist.all_reduce(self.gram, group=group)
        dist.all_reduce(count, group=group)
        self.count = count.cpu()

    @property
    def finite(self) -> bool:
        return bool(self.gram.diagonal(dim1=-2, dim2=-1).isfinite().all())

    def matrix(self) -> Tensor:
        """``C``, symmetric, ``[…, n, n]``; stacks without rows are zero. Takes the sums' memory."""
        out, n = self.gram, self.gram.shape[-1]
        if out.dim() == 2:
            for start, stop in _blocks(n):
                out[stop:, start:stop] = out[start:stop, stop:].T
        count = self.count.clamp(min=1).to(out.device)[..., None, None]
        out /= count.to(out.dtype)
        if self.total is not None:
            mean = (self.total / count.squeeze(-1)).to(out.dtype)
            out -= mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return out


def _blocks(size: int) -> list[tuple[int, int]]:
    count = _BLOCKS if size >= _BLOCKS * _SMALL // 2 else 1
    edges = [size * k // count for k in range(count + 1)]
    return list(itertools.pairwise(edges))


def eigenbasis(matrix: Tensor, top: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvectors as columns, of falling eigenvalue, and all eigenvalues (none below zero).

    Of every vector the largest entry is positive, so that equal matrices give equal bases. ``eigh``, not ``svd``: 2.4
    to 3.3 times as fast on covariances, and it cannot mix up left and right vectors.

    Args:
        matrix: Symmetric, ``[…, n, n]``.
        top: Number of vectors to keep.

    Returns:
        Vectors ``[…, n, top]`` and values ``[…, n]``.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    if top is not None:
        vectors = vectors[..., :top]
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors).contiguous(), values
