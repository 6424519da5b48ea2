"""What methods of gradients share: where rows come from, weights of slots, and when a reference is nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradsurgery.errors import PlanError

FLOOR = 1e-6
"""Where a reference's gradient is that much smaller than the other one, it is rounding and has no direction: model and
reference agree, or the reference's rows do not reach the weights (attention over a single token has no query)."""

By = Literal["rows", "stream"]
"""Whether ``forget`` and ``retain`` name bool columns of one batch, or sub-batches of their own."""


def source(by: By, name: str, method: str) -> dict[str, Any]:
    """The argument of a pass that takes its rows from ``name``."""
    if by not in ("rows", "stream"):
        raise PlanError(f'{method}: by is "rows", bool columns of one batch, or "stream", sub-batches; not {by!r}.')
    return {by: name}


def require_weight(value: Any, name: str, method: str, positive: bool = False) -> float:
    """A finite weight that is not negative (``positive``: nor zero)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (positive and value == 0):
        least = "a positive number" if positive else "a number from 0"
        raise PlanError(f"{method}: {name} is {least}, not {value!r}.")
    return float(value)


@dataclass(frozen=True)
class Fixed:
    """A weighting for ``gs.aggregate`` that does not look at the gradients: one number a slot."""

    weights: tuple[float, ...]

    def __call__(self, gram: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=gram.dtype, device=gram.device)
