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
        if not isinstance(self.max_norm, (int, float)) or not 0 < self.max_norm < math.inf:
            raise PlanError(f"clip takes a positive finite norm, not {self.max_norm!r}.")

    def apply(self, context: StepContext, state: dict[str, Any]) -> None:
        by_mesh: dict[Any, list[torch.nn.Parameter]] = {}  # an adapter may lie replicated beside sharded weights
        for parameter in context.parameters.values():
            if parameter.grad is not None:
                by_mesh.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in found if p.grad is not None]) for found in by_mesh.values()
        ]
        norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
        total = (
            norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        )
        for found in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(found, self.max_norm, total)
        context.metrics["grad_norm"] = total

    def describe(self) -> str:
        return f"clip({self.max_norm})"


def clip(max_norm: float) -> Clip:
    """Clip the global gradient norm to ``max_norm``; see `Clip`."""
    return Clip(max_norm)
