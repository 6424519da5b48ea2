"""Decoupled weight decay of a region towards given values (L2-SP: Li et al. 2018, arXiv 1802.01483, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError, SelectionError
from gradsurgery.tensors import gather, put_
from gradsurgery.transforms.base import Traits, require_entries
from gradsurgery.transforms.engine.program import box_columns
from gradsurgery.transforms.stages import StepContext, UpdateTransform


@dataclass(frozen=True, eq=False)
class DecayTo(UpdateTransform):
    """``theta <- theta - lr * rate * (theta - values)`` on the entries of ``region``, before each optimizer step.

    Entries of parameters that are not stepped (``grad=None``) do not decay, as with AdamW's own decay.

    Args:
        region: Entries that decay.
        values: Tensors by parameter name, of the parameters' shapes; ``None`` for zero.
        rate: Decay per unit of learning rate, AdamW's ``weight_decay``.

    Raises:
        SelectionError: ``region`` is empty, or ``values`` lack one of its parameters or have another shape.
        PlanError: a rate that is negative or not finite.

    Example:
        >>> start = {name: p.detach().clone() for name, p in model.named_parameters()}
        >>> method = gs.Method([gs.Pass("all")], update=[gs.decay_to(anatomy.neurons[:, :8], start, rate=0.01)])
    """

    region: Region
    values: Mapping[str, Tensor] | None = None
    rate: float = 0.01
    traits = Traits()

    def __post_init__(self) -> None:
        require_entries(self.region, "decay_to")
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 <= self.rate < math.inf:
            raise PlanError(f"decay_to: rate is a finite number from 0 on, not {self.rate!r}.")
        for name, entries in self.region.entries.items() if self.values is not None else ():
            assert self.values is not None
            if name not in self.values or tuple(self.values[name].shape) != entries.shape:
                given = list(self.values[name].shape) if name in self.values else "absent"
                raise SelectionError(
                    f"decay_to: values of {name} must be {list(entries.shape)}, as the weight, and are {given}."
                )

    def regions(self) -> Iterable[Region]:
        return (self.region,)

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        boxes = {
            name: [box_columns(box, part.shape) for box in part.boxes()] for name, part in self.region.entries.items()
        }
        return {"boxes": boxes}

    def before_step(self, context: StepContext, state: dict[str, Any]) -> None:
        if context.optimizer is None:
            raise PlanError("decay_to takes its step size from an optimizer: surgery.bind(optimizer).")
        rates = {id(p): float(group["lr"]) for group in context.optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, boxes in state["boxes"].items():
                parameter = context.parameters[name]
                factor = rates.get(id(parameter), 0.0) * self.rate
                if parameter.grad is None or not factor:
                    continue
                parts = gather(parameter.data, boxes)
                if self.values is None:
                    parts = [part.mul_(1 - factor) for part in parts]
                else:
                    goals = gather(self.values[name].to(parameter.device, parameter.dtype), boxes)
                    parts = [part.lerp_(goal, factor) for part, goal in zip(parts, goals, strict=True)]
                put_(parameter.data, boxes, parts)

    def describe(self) -> str:
        return super().describe()[:-1] + f", {'given values' if self.values is not None else 'zero'}, rate={self.rate})"


def decay_to(region: Region, values: Mapping[str, Tensor] | None = None, rate: float = 0.01) -> DecayTo:
    """Weight decay of ``region`` towards ``values``; see `DecayTo`."""
    return DecayTo(region, values, rate)
