"""Leakage: how much of the unlabelled forget data a model learned in what is left of it after removal.

    leakage = |D_standard| / |D_unlabelled|

``D_standard`` is the forget data that plain training (on the same retain data) needs for the same forget loss,
``D_unlabelled`` the forget data that carried no label (SGTM, arXiv 2512.05648, equation 1). Data filtering has
leakage 1 by definition. Forget losses are taken without calibration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gradsurgery.errors import DataError


@dataclass(frozen=True)
class Leakage:
    """What `leakage` found.

    Attributes:
        value: ``equivalent / unlabelled``.
        equivalent: Forget data of plain training with the same loss, in the unit of the baselines.
        bound: ``"="``; ``"<="``: the loss is above that of the smallest baseline, so that the value is at most this;
            ``">="``: it is below that of the largest baseline.
        crossings: At how many amounts the baselines have this loss; more than one where they are not monotone (noise),
            and the smallest amount is taken.
    """

    value: float
    equivalent: float
    bound: Literal["=", "<=", ">="]
    crossings: int

    def __str__(self) -> str:
        return f"{'' if self.bound == '=' else self.bound + ' '}{self.value:.4g}"


def leakage(loss: float, unlabelled: float, baselines: Iterable[tuple[float, float]]) -> Leakage:
    """Equation 1, with the amount interpolated linearly between the two baselines around the loss.

    Args:
        loss: Forget loss after removal, uncalibrated, in nats per token.
        unlabelled: Forget data without a label that the model was trained on (tokens, say); above 0.
        baselines: ``(amount, forget loss)`` of plain training on known amounts of forget data, in the same unit.

    Returns:
        The value; outside of the baselines the nearest one's, and ``bound`` says which way it is off.

    Raises:
        DataError: fewer than two baselines, two of one amount, amounts or losses that are no numbers.

    Example:
        >>> from gradsurgery.evaluation import leakage
        >>> found = leakage(5.5, unlabelled=100, baselines=[(0, 9.0), (10, 6.0), (50, 4.0)])
        >>> found.equivalent, found.value, found.bound                  # a quarter of the way from 10 to 50
        (20.0, 0.2, '=')
        >>> str(leakage(9.5, unlabelled=100, baselines=[(10, 6.0), (50, 4.0)]))
        '<= 0.1'
    """
    points = sorted((float(amount), float(value)) for amount, value in baselines)
    if len(points) < 2:
        raise DataError(f"leakage interpolates between baselines of known amounts: give at least 2, not {len(points)}.")
    if not all(math.isfinite(x) for point in points for x in point) or points[0][0] < 0 or not math.isfinite(loss):
        raise DataError(f"leakage: a loss or an amount is no number (loss {loss}, baselines {points}).")
    if len({amount for amount, _ in points}) < len(points):
        raise DataError("leakage: two baselines have one amount of forget data; give their mean.")
    if not 0 < unlabelled < math.inf:
        raise DataError(f"unlabelled={unlabelled}: leakage is per unlabelled forget data; give an amount above 0.")
    found = _crossings(points, loss)
    if found:
        return Leakage(min(found) / unlabelled, min(found), "=", len(found))
    above = loss > points[0][1]
    nearest = points[0][0] if above else points[-1][0]
    return Leakage(nearest / unlabelled, nearest, "<=" if above else ">=", 0)


def _crossings(points: list[tuple[float, float]], loss: float) -> list[float]:
    """Amounts at which the line through the baselines has the loss."""
    found = {amount for amount, value in points if value == loss}
    for (a, high), (b, low) in itertools.pairwise(points):
        if (high - loss) * (low - loss) < 0:
            found.add(a + (high - loss) / (high - low) * (b - a))
    return sorted(found)
