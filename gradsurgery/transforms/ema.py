"""Running means of gradients, for references that live longer than a step (GRU: Wang et al. 2025, arXiv 2503.09117)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.projection import grads
from gradsurgery.transforms.stages import GradientTransform, StepContext


@dataclass(frozen=True)
class Ema(GradientTransform):
    """``r <- decay * r + (1 - decay) * slot``, once per optimizer step; in the first step ``r = slot``.

    The mean is kept in fp32 at least and saved with the surgery; a parameter without a gradient in the slot counts as
    zero. A step that a scaler skips does not count.

    Args:
        slot: What is averaged.
        decay: Share of the old mean, from 0 up to 1 (excluded).
        into: Slot that holds r afterwards; ``None`` for ``slot`` itself.

    Raises:
        PlanError: a decay out of range, or no name of a slot.

    Example:
        >>> retain = gs.Pass("retain", rows="retain", into="protect")
        >>> forget = gs.Pass("forget", rows="forget", weight=-1.0)
        >>> clear = gs.project(away_from="protect", remove="conflict")
        >>> gru = gs.Method([forget, retain], gradient=[gs.ema("protect", 0.8), clear])
    """

    slot: str
    decay: float = 0.8
    into: str | None = None
    traits = Traits(linear=True, stateful=True)

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0 <= self.decay < 1:
            raise PlanError(f"ema: decay lies from 0 up to 1 (excluded), {self.decay!r} does not.")
        for slot in (self.slot, self.into):
            if slot is not None and (not isinstance(slot, str) or not slot):
                raise PlanError(f"ema takes names of slots, not {slot!r}.")

    def reads(self) -> Iterable[str]:
        return (self.slot,)

    def fills(self) -> Iterable[str]:
        return (self.into,) if self.into is not None else ()

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def apply(self, context: StepContext, state: dict[str, Any]) -> None:
        given = grads.read(context, self.slot, self.describe())
        first = not state
        for name in [name for name in state if name not in given]:
            state[name].mul_(self.decay)
        out = {}
        for name, grad in given.items():
            held = state.get(name)
            to = torch.promote_types(grad.dtype, torch.float32)
            if held is None:
                state[name] = grad.to(to, copy=True) if first else grad.to(to) * (1 - self.decay)
            else:
                state[name] = held = grads.fitted(held, context.parameters[name], self.describe(), name).to(to)
                held.lerp_(grad.to(to), 1 - self.decay)
            if self.into in (None, self.slot):
                grad.copy_(state[name])
            else:
                out[name] = state[name].to(grad.dtype, copy=True)
        # what this step has no gradient for is in the mean all the same
        for name in state.keys() - given.keys():
            mean = grads.fitted(state[name], context.parameters[name], self.describe(), name)
            out[name] = mean.to(context.parameters[name].dtype, copy=True)
        grads.write(context, self.into or self.slot, out)

    def describe(self) -> str:
        return f"ema({self.slot!r}, decay={self.decay}{f', into={self.into!r}' if self.into else ''})"


def ema(slot: str, decay: float = 0.8, into: str | None = None) -> Ema:
    """Replace a slot by its running mean; see `Ema`."""
    return Ema(slot, decay, into)
