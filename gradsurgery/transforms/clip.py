"""Global norm clip on the gradient that is stepped with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gradsurgery.errors import PlanError
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.stages import GradientTransform, StepContext


@dataclass(frozen=True)
class Clip(GradientTransform):
    """``g <- g * min(1, max_norm / |g|)`` over all parameters, last in the gradient stage.

    Frozen entries, and entries that no pass sends gradient to, do not count. The norm before clipping is in
    ``surgery.metrics()["grad_norm"]``.

    Args:
        max_norm: Largest global L2 norm; positive.

    Raises:
        PlanError: ``max_norm`` is no positive number.
    """

    max_norm: float
    traits = Traits(idempotent=True, norm_nonincreasing=True)

    def __post_init__(self) -> None:
        if not (self.max_norm > 0 and math.isfinite(self.max_norm)):
            raise PlanError(f"clip takes a positive finite norm, not {self.max_norm!r}.")

    def apply(self, context: StepContext, state: dict[str, Any]) -> None:
        grads = [p.grad for p in context.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        torch.nn.utils.clip_grads_with_norm_(
            [p for p in context.parameters.values() if p.grad is not None], self.max_norm, norm
        )
        context.metrics["grad_norm"] = norm

    def describe(self) -> str:
        return f"clip({self.max_norm})"


def clip(max_norm: float) -> Clip:
    """Clip the global gradient norm to ``max_norm``; see `Clip`."""
    return Clip(max_norm)
