"""Transforms around a pass, on the reduced gradient, or around the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.transforms.base import Transform


@dataclass
class StepContext:
    """What the gradient and update stages see of one optimizer step.

    Attributes:
        parameters: The model's parameters by canonical name.
        optimizer: The optimizer about to step, if one is bound.
        slots: Named gradients other than ``.grad``, by slot and parameter name.
        ran: Names of the passes that ran since the last step.
        step: Number of optimizer steps done before this one.
        metrics: Figures of this step, by name; transforms add theirs.
        model: The unwrapped model.
        frozen: Entries that `gs.freeze` holds in this step, if any.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None = None
    slots: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    ran: frozenset[str] = frozenset()
    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    frozen: Region | None = None

    @classmethod
    def of(cls, model: nn.Module, **rest: Any) -> StepContext:
        """A context over all parameters of a model (unwrapped), looked up now: sharding replaces them."""
        return cls(dict(model.named_parameters()), model=model, **rest)


class WeightTransform(Transform):
    """Changes the weights around a pass, and with them the gradients that are there; undone after the backward."""

    stage = "weights"

    def check(self, model: nn.Module) -> None:
        """Raise where the transform does not fit a model."""

    def during(self, model: nn.Module, slots: Mapping[str, Mapping[str, Tensor]]) -> AbstractContextManager[None]:
        """The pass runs inside this block; ``slots`` are the named gradients other than ``.grad``."""
        raise NotImplementedError


class GradientTransform(Transform):
    """Acts on the accumulated, reduced gradient, once per optimizer step; may keep explicit state."""

    stage = "gradient"

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        """The state before the first step; kept and saved by the surgery."""
        return {}

    def apply(self, context: StepContext, state: dict[str, Any]) -> None:
        raise NotImplementedError


class UpdateTransform(Transform):
    """Acts around the optimizer step, the one stage that keeps promises about weights."""

    stage = "update"
    outer: ClassVar[int] = 0
    """Those with the largest come first and leave last: what looks at a whole step, wherever it stands in the list."""

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        return {}

    def bound(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is known whose steps this is around."""

    def prepare(self, context: StepContext, state: dict[str, Any]) -> None:
        """Before clipping: what must not count towards the norm leaves the gradient."""

    def before_step(self, context: StepContext, state: dict[str, Any]) -> None:
        """Right before the step: remember what must be restored."""

    def after_step(self, context: StepContext, state: dict[str, Any]) -> None:
        """Right after the step."""

    def skip(self, state: dict[str, Any]) -> None:
        """Instead of all of these, before a step that runs with the surgery disabled."""
