"""Step in C2: the optimizer sees keyed weights, gradients and moments at their C2 places.

With an elementwise optimizer this equals stepping in C1 with the gradients following. Moments that were made in C1
follow at the first step, and return there when the surgery is removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradsurgery.errors import PlanError
from gradsurgery.keys import configuration as state
from gradsurgery.keys.apply import turn_moments
from gradsurgery.keys.key import PermutationKey
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.stages import StepContext, UpdateTransform


@dataclass(frozen=True, eq=False)
class StepUnder(UpdateTransform):
    """Apply a key for the time of the optimizer's step (the originals step so); stands first in ``update=[…]``.

    Args:
        key: The key.

    Example:
        >>> key = gs.PermutationKey.generate(anatomy, seed=0)
        >>> method = gs.Method([gs.Pass("C1"), gs.Pass("C2", under=[key])], update=[gs.keys.StepUnder(key)])
    """

    key: PermutationKey
    traits = Traits(stateful=True)

    def __post_init__(self) -> None:
        if not isinstance(self.key, PermutationKey):
            raise PlanError(f"StepUnder takes a gs.PermutationKey, not {type(self.key).__name__}.")

    def init(self, space: Any) -> dict[str, Any]:
        return {"moments": "C1"}

    def bound(self, optimizer: torch.optim.Optimizer) -> None:
        state.step_under(optimizer, self.key.fingerprint)  # loaded moments may lie in C2 before the first step

    def before_step(self, context: StepContext, state_: dict[str, Any]) -> None:
        base, optimizer, fingerprint = model_of(context), context.optimizer, self.key.fingerprint
        if optimizer is None:
            raise PlanError("StepUnder applies a key for the time of an optimizer's step: surgery.bind(optimizer).")
        if state_["moments"] == fingerprint:
            state.set_moments(optimizer, base, frozenset([fingerprint]))  # also after a resume
        elif state.has_moments(optimizer, base):
            turn_moments(base, self.key.plan_for(base), optimizer, fingerprint)  # of steps in C1
        state_["moments"] = fingerprint
        self.key.apply_(base)

    def after_step(self, context: StepContext, state_: dict[str, Any]) -> None:
        self.key.unapply_(model_of(context))

    def close(self, context: StepContext, state_: dict[str, Any]) -> None:
        """The surgery is over: the moments return to C1."""
        optimizer = context.optimizer
        if optimizer is not None:
            state.step_under(optimizer, None)
        if optimizer is None or state_["moments"] != self.key.fingerprint:
            return
        base, state_["moments"] = model_of(context), "C1"
        if state.has_moments(optimizer, base):
            state.set_moments(optimizer, base, frozenset([self.key.fingerprint]))
            turn_moments(base, self.key.plan_for(base), optimizer, self.key.fingerprint)

    def describe(self) -> str:
        return f"step in C2 of {self.key.describe()}"


def model_of(context: StepContext) -> nn.Module:
    if context.model is None:
        raise PlanError("StepUnder needs the model of the step; run it by gs.attach.")
    return context.model
