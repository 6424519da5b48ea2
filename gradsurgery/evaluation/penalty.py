"""Compute penalty: how much of its training compute a method gives away, read off a scaling curve of plain models.

    L(C) = a + b * C ** -alpha            fitted to plain models of several sizes (Hoffmann et al. 2022, 2203.15556)
    penalty = 1 - C_equivalent / C        C_equivalent: what a plain model needs for the same loss

SGTM (arXiv 2512.05648, figure 9) fits the curve without ``a``: ``irreducible=False``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gradsurgery.errors import DataError

ALPHAS = (1e-3, 3.0)


@dataclass(frozen=True)
class ScalingCurve:
    """``a + b * C ** -alpha``; ``residual`` is the root mean square of the fit's errors, in nats per token.

    Attributes:
        bounds: Least and largest compute that the curve was fitted to.
        points: How many models it was fitted to; with as many as parameters, ``residual`` says nothing.
    """

    a: float
    b: float
    alpha: float
    residual: float
    bounds: tuple[float, float]
    points: int

    def loss(self, compute: float) -> float:
        """Loss of a plain model of that compute."""
        return self.a + self.b * compute**-self.alpha

    def compute(self, loss: float) -> float:
        """Compute of a plain model of that loss.

        Raises:
            DataError: no compute reaches it.
        """
        if loss <= self.a:
            raise DataError(
                f"a loss of {loss:.4g} lies below the curve's irreducible {self.a:.4g}: nothing reaches it."
            )
        return float((self.b / (loss - self.a)) ** (1 / self.alpha))


@dataclass(frozen=True)
class Penalty:
    """Share of the compute that is given away (below 0: gained), and whether the curve had to be extrapolated."""

    value: float
    equivalent: float
    extrapolated: bool


def fit_scaling_curve(compute: Sequence[float], losses: Sequence[float], *, irreducible: bool = True) -> ScalingCurve:
    """Least squares with ``0 <= a``, ``0 < b`` and ``alpha`` from 0.001 to 3.

    Args:
        compute: FLOPs of each model's training.
        losses: Their losses.
        irreducible: Fit ``a``, too; otherwise it is 0.

    Raises:
        DataError: fewer models than parameters, values that are not positive, losses that do not fall with compute.

    Example:
        >>> from gradsurgery.evaluation import fit_scaling_curve
        >>> curve = fit_scaling_curve([1, 16, 256, 4096], [1 + 2 * c ** -0.25 for c in (1, 16, 256, 4096)])
        >>> round(curve.a, 3), round(curve.b, 3), round(curve.alpha, 3)
        (1.0, 2.0, 0.25)
    """
    needed = 3 if irreducible else 2
    if len(compute) != len(losses) or len(set(compute)) < needed:
        raise DataError(
            f"a scaling curve with{'' if irreducible else 'out'} a has {needed} parameters: give losses of {needed} "
            f"models of different compute or more, not {len(losses)} losses of {len(set(compute))}."
        )
    if not all(0 < x < math.inf for x in (*compute, *losses)):
        raise DataError("a scaling curve is fitted to positive compute and losses.")
    c = torch.tensor(compute, dtype=torch.float64)
    y = torch.tensor(losses, dtype=torch.float64)
    unit = float(c.log().mean().exp())  # of compute: powers of 1e18 leave no digits
    c = c / unit
    if float(c.log() @ (y - y.mean())) >= 0:
        raise DataError("the losses do not fall with compute: there is no scaling curve to fit.")

    def solve(alpha: float) -> tuple[float, float, float]:
        """For a given alpha the best a and b are a linear problem of two unknowns."""
        x = c**-alpha
        options = []
        if irreducible:
            centred = x - x.mean()
            slope = float(centred @ y / (centred @ centred))
            options.append((float(y.mean()) - slope * float(x.mean()), slope))
        options.append((0.0, float(x @ y / (x @ x))))  # a at its bound
        feasible = [(a, b) for a, b in options if a >= 0 and b > 0]
        return min((float((a + b * x - y).square().mean()), a, b) for a, b in feasible)

    grid = torch.linspace(math.log(ALPHAS[0]), math.log(ALPHAS[1]), 241, dtype=torch.float64).tolist()
    k = min(range(len(grid)), key=lambda i: solve(math.exp(grid[i]))[0])
    alpha = math.exp(_least(lambda t: solve(math.exp(t))[0], grid[max(k - 1, 0)], grid[min(k + 1, 240)]))
    error, a, b = solve(alpha)
    return ScalingCurve(a, b * unit**alpha, alpha, math.sqrt(error), (min(compute), max(compute)), len(losses))


def compute_penalty(curve: ScalingCurve, loss: float, compute: float) -> Penalty:
    """``1 - C_equivalent / compute`` for a model of that loss and training compute.

    Raises:
        DataError: compute that is not positive; a loss that no plain model reaches.

    Example:
        >>> from gradsurgery.evaluation import compute_penalty, fit_scaling_curve
        >>> curve = fit_scaling_curve([1, 100], [2.0, 1.0], irreducible=False)
        >>> round(compute_penalty(curve, loss=curve.loss(50.0), compute=100.0).value, 6)
        0.5
    """
    if not 0 < compute < math.inf:
        raise DataError(f"compute={compute}: a penalty is a share of a positive number of FLOPs.")
    equivalent = curve.compute(loss)
    low, high = curve.bounds
    return Penalty(1 - equivalent / compute, equivalent, not low <= equivalent <= high)


def _least(f: Callable[[float], float], low: float, high: float) -> float:
    """Golden-section search of a minimum between two points."""
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-10:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if f(left) < f(right) else (left, high)
    return (low + high) / 2
