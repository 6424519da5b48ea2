"""Exact freeze: entries do not move, whatever momentum and weight decay say.

AdamW moves entries whose gradient is zero (stale moments, decoupled decay); only around the step can a promise about
weights be kept (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2, lines 9-12).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.tensors import Box, fill_, gather, put_
from gradsurgery.transforms.base import Traits, require_entries
from gradsurgery.transforms.engine.program import box_columns
from gradsurgery.transforms.stages import StepContext, UpdateTransform


@dataclass(frozen=True, eq=False)
class Freeze(UpdateTransform):
    """``theta[region]`` is bit for bit the same before and after every optimizer step.

    Frozen entries leave the gradient before clipping; a wholly frozen parameter gets ``grad=None``. Optimizer state of
    the parameter's shape (momenta) is restored on frozen entries, factored state (Adafactor's rows and columns) is not.

    Args:
        region: Entries that do not move.
        unless: Name of a pass, or several; in steps where one of them ran, nothing is frozen.

    Raises:
        SelectionError: ``region`` is empty.

    Example:
        >>> method = gs.Method(passes=[gs.Pass("all")], update=[gs.freeze(anatomy.neurons[:, :16])])
    """

    region: Region
    unless: str | tuple[str, ...] | None = None
    traits = Traits(idempotent=True, norm_nonincreasing=True)

    def __post_init__(self) -> None:
        require_entries(self.region, "freeze")
        if self.unless is not None and not isinstance(self.unless, str):
            object.__setattr__(self, "unless", tuple(self.unless))

    def regions(self) -> Iterable[Region]:
        return (self.region,)

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        boxes = {
            name: [box_columns(box, part.shape) for box in part.boxes()]
            for name, part in self.region.entries.items()
            if not part.whole
        }
        return {"boxes": boxes, "saved": [], "clean": {}}

    def _sleeps(self, context: StepContext) -> bool:
        return not self.awake(context.ran)

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that let the entries move."""
        return (self.unless,) if isinstance(self.unless, str) else self.unless or ()

    def awake(self, ran: frozenset[str] | set[str]) -> bool:
        """Whether the entries are frozen in a step in which these passes ran."""
        return not any(name in ran for name in self.passes)

    def prepare(self, context: StepContext, state: dict[str, Any]) -> None:
        if self._sleeps(context):
            return
        for name in self.region.entries:
            parameter = context.parameters[name]
            if name not in state["boxes"]:
                parameter.grad = None
            elif parameter.grad is not None:
                fill_(parameter.grad, state["boxes"][name], 0.0)

    def before_step(self, context: StepContext, state: dict[str, Any]) -> None:
        state["saved"].clear()
        if self._sleeps(context):
            state["clean"].clear()
            return
        decayed = _decayed_moments(context)
        for name, boxes in state["boxes"].items():
            parameter = context.parameters[name]
            if parameter.grad is None:
                continue
            kept = [(parameter.data, gather(parameter.data, boxes))]
            for key, moment in _moments(context, parameter):
                if id(parameter) in decayed or not self._known_zero(state, (name, key), moment, boxes):
                    kept.append((moment, gather(moment, boxes)))
            state["saved"].append((boxes, kept))

    @staticmethod
    def _known_zero(state: dict[str, Any], key: tuple[str, str], moment: Tensor, boxes: list[Box]) -> bool:
        """Moments that were zero on the frozen entries stay zero, since their gradient is: no copy is needed."""
        known = state["clean"].get(key)
        if known is None or known[0]() is not moment:
            zero = not any(bool(part.count_nonzero()) for part in gather(moment, boxes))
            state["clean"][key] = known = (weakref.ref(moment), zero)
        return known[1]

    def after_step(self, context: StepContext, state: dict[str, Any]) -> None:
        for boxes, kept in state["saved"]:
            for tensor, values in kept:
                put_(tensor, boxes, values)
        state["saved"].clear()

    def skip(self, state: dict[str, Any]) -> None:
        state["saved"].clear()
        state["clean"].clear()  # moments may leave zero in this step

    def describe(self) -> str:
        return super().describe()[:-1] + (f", unless={self.unless!r})" if self.unless else ")")


def _moments(context: StepContext, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    if context.optimizer is not None:
        for key, value in context.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                yield str(key), value


def _decayed_moments(context: StepContext) -> set[int]:
    """Parameters whose weight decay enters the moments (Adam's L2, SGD's), which then do not stay zero."""
    groups = context.optimizer.param_groups if context.optimizer is not None else []
    coupled = [g for g in groups if g.get("weight_decay") and not g.get("decoupled_weight_decay")]
    return {id(parameter) for group in coupled for parameter in group["params"]}


def freeze(region: Region, unless: str | tuple[str, ...] | None = None) -> Freeze:
    """Entries of ``region`` do not move; see `Freeze`."""
    return Freeze(region, unless)
