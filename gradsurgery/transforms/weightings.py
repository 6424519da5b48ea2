"""Weightings: from the Gram matrix of some gradients to how much each of them counts in their sum.

Each is a function of ``G[s, t] = <g_s, g_t>`` (``[tasks, tasks]``, fp64) alone, as in TorchJD (Quinton & Rey 2024,
arXiv 2406.16232), whose weightings can be given in their place.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery.transforms.projection.solve import non_negative

Weighting = Callable[[Tensor], Tensor]


def total(gram: Tensor) -> Tensor:
    """Every gradient counts once.

    >>> total(torch.eye(2).double()).tolist()
    [1.0, 1.0]
    """
    return torch.ones(len(gram), dtype=gram.dtype)


def mean(gram: Tensor) -> Tensor:
    """The mean of the gradients.

    >>> mean(torch.eye(2).double()).tolist()
    [0.5, 0.5]
    """
    return torch.full((len(gram),), 1 / len(gram), dtype=gram.dtype)


def mgda(gram: Tensor) -> Tensor:
    """The shortest vector in the convex hull of the gradients (MGDA: Désidéri 2012; Sener & Koltun 2018, 1810.04650).

    For two gradients ``w = clip(<g_2 - g_1, g_2> / |g_1 - g_2|², 0, 1)``. For more, the ``v >= 0`` with the least
    ``v·(G + t 11ᵀ)v / 2 - t 1·v`` lies on the ray of the wanted weights, for any t > 0: along each ray that is a
    quadratic, and its minimum is the lower the shorter the vector of the ray's point with sum 1.

    >>> mgda(torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()).tolist()
    [0.75, 0.25]
    """
    if len(gram) == 2:
        (a, b), (_, d) = gram.tolist()
        apart = a - 2 * b + d
        w = min(max((d - b) / apart, 0.0), 1.0) if apart > 0 else 0.5
        return torch.tensor([w, 1 - w], dtype=gram.dtype)
    shift = float(gram.diagonal().mean())
    if not shift > 0:
        return mean(gram)
    v = non_negative(gram / shift + 1, torch.ones(len(gram), dtype=gram.dtype))
    return v / v.sum()


@dataclass(frozen=True)
class PCGrad:
    """Each gradient loses what conflicts with the others, one after the other, and the results are added.

    ``g_i <- g_i - min(0, <g_i, g_j>) / |g_j|² g_j`` for all j ≠ i in random order, with the original ``g_j`` (Yu et al.
    2020, arXiv 2001.06782, algorithm 1). The order is a function of seed and step, equal on all ranks.

    Args:
        seed: Draws the orders.

    Example:
        >>> gs.PCGrad(seed=0)(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]).double()).tolist()
        [1.5, 1.5]
    """

    seed: int = 0
    takes_step = True

    def __call__(self, gram: Tensor, step: int = 0) -> Tensor:
        draws = random.Random(f"{self.seed}/{step}")
        tasks = len(gram)
        weights = torch.eye(tasks, dtype=gram.dtype)
        for i in range(tasks):
            others = [j for j in range(tasks) if j != i]
            draws.shuffle(others)
            for j in others:
                along = float(weights[i] @ gram[:, j])
                if along < 0 and gram[j, j] > 0:
                    weights[i, j] -= along / float(gram[j, j])
        return weights.sum(0)


NAMED: dict[str, Weighting] = {"sum": total, "mean": mean, "pcgrad": PCGrad(0), "mgda": mgda}
