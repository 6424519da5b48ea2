"""Observers of the optimizer's step: what really moved, and where it went. They change nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError
from gradsurgery.tensors import Difference
from gradsurgery.transforms.base import Traits, require_entries
from gradsurgery.transforms.projection import grads
from gradsurgery.transforms.projection.layout import Part, parts_of
from gradsurgery.transforms.projection.measure import over_shards, part_products
from gradsurgery.transforms.projection.report import cosine
from gradsurgery.transforms.projection.targets import Moved, flat_of
from gradsurgery.transforms.stages import StepContext, UpdateTransform


class Observer(UpdateTransform):
    """Copies what may move before a step, and looks at it afterwards."""

    outer = 2
    every: int
    per_module: bool
    traits = Traits()

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        return {}

    def _check(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise PlanError(f"{self.name}: every is a positive number of steps, not {self.every!r}.")

    def _look(self, context: StepContext, state: dict[str, Any], region: Region | None) -> bool:
        """Copy what may move, if this step is looked at."""
        self.skip(state)
        if context.step % self.every:
            return False
        parts = parts_of(context, region, None, state.setdefault("parts", {}))
        state["moved"] = Moved(context.parameters, parts)
        return True

    def skip(self, state: dict[str, Any]) -> None:
        state.pop("moved", None)
        state.pop("vector", None)

    def _note(self, context: StepContext, label: str, parts: list[Part], figures: Tensor, value: Any) -> None:
        """Put ``value`` of the summed figures into the metrics, of all parts and by module."""
        context.metrics[label] = value(figures.sum(0))
        if self.per_module:
            modules: dict[str, list[int]] = {}
            for k, part in enumerate(parts):
                modules.setdefault(part.module, []).append(k)
            for module, members in modules.items():
                context.metrics[f"{label}/module/{module}"] = value(figures[members].sum(0))


@dataclass(frozen=True, eq=False)
class Leak(Observer):
    """Cosine of the parameters' delta over the optimizer's step with a slot: ``leak/<slot>`` in the metrics.

    An optimizer with momentum and a preconditioner turns an orthogonal gradient into a step that is not; this is how
    far. Negative: the step went downhill on the slot's loss. Costs a copy of the parameters in the steps it looks at.

    Args:
        away_from: The slot.
        per_module: Also by module, ``leak/<slot>/module/<name>``.
        every: Look at every so many steps.

    Raises:
        PlanError: ``every`` is no positive number.

    Example:
        >>> p = gs.Pass("p", {"a": gs.losses.causal_lm, "b": gs.losses.causal_lm}, into={"a": "main", "b": "protect"})
        >>> method = gs.Method([p], gradient=[gs.project()], update=[gs.leak()])
    """

    away_from: str = "protect"
    per_module: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        self._check()
        if not isinstance(self.away_from, str) or not self.away_from or self.away_from == "main":
            raise PlanError(f"leak: away_from is the name of a slot other than 'main', not {self.away_from!r}.")

    def reads(self) -> Iterable[str]:
        return (self.away_from,)

    @torch.no_grad()
    def before_step(self, context: StepContext, state: dict[str, Any]) -> None:
        if self._look(context, state, None):
            (state["vector"],) = grads.vectors_of(context, [self.away_from], self.describe())

    @torch.no_grad()
    def after_step(self, context: StepContext, state: dict[str, Any]) -> None:
        moved, vector = state.pop("moved", None), state.pop("vector", None)
        if moved is None or vector is None:
            return
        parts = list(moved.before)

        def columns(part: Part) -> list[Any]:
            return [moved.flat(part), flat_of(vector.get(part.name), part.boxes)]

        gram = part_products(parts, columns, 2, context.parameters)
        self._note(context, f"leak/{self.away_from}", parts, gram, cosine)

    def describe(self) -> str:
        return f"leak({self.away_from!r}{f', every={self.every}' if self.every > 1 else ''})"


@dataclass(frozen=True, eq=False)
class ChangedFraction(Observer):
    """Share of the entries that the optimizer's step really moved: ``changed_fraction`` in the metrics.

    Weights stored in bf16 stay where they are when the step is below half of their spacing (1/256 of their size), which
    nothing else tells. Costs a copy of the region in the steps it looks at.

    Args:
        region: What to look at; ``None`` for all that trains.
        per_module: Also by module, ``changed_fraction/module/<name>``.
        every: Look at every so many steps.

    Raises:
        SelectionError: an empty region.
        PlanError: ``every`` is no positive number.

    Example:
        >>> method = gs.Method([gs.Pass("all")], update=[gs.changed_fraction(every=10)])
    """

    region: Region | None = None
    per_module: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        self._check()
        if self.region is not None:
            require_entries(self.region, "changed_fraction")

    @property
    def name(self) -> str:
        return "changed_fraction"

    def regions(self) -> Iterable[Region]:
        return () if self.region is None else (self.region,)

    @torch.no_grad()
    def before_step(self, context: StepContext, state: dict[str, Any]) -> None:
        self._look(context, state, self.region)

    @torch.no_grad()
    def after_step(self, context: StepContext, state: dict[str, Any]) -> None:
        moved = state.pop("moved", None)
        if moved is None:
            return
        parts = list(moved.before)

        def counts(part: Part) -> Tensor:
            pieces = [piece for piece in moved.flat(part) or () if isinstance(piece, Difference)]
            changed = sum(int((a != b).sum()) for a, b in pieces)
            return torch.tensor([changed, sum(a.numel() for a, _ in pieces)], dtype=torch.float64)

        figures = over_shards(parts, counts, 2, context.parameters)
        self._note(context, "changed_fraction", parts, figures, lambda f: float(f[0] / f[1]) if f[1] else 0.0)

    def describe(self) -> str:
        facts = [r.text or f"{r.numel():,} entries {r.digest}" for r in self.regions()]
        facts += [f"every={self.every}"] if self.every > 1 else []
        return f"changed_fraction({', '.join(facts)})"


def leak(away_from: str = "protect", per_module: bool = False, every: int = 1) -> Leak:
    """How far the optimizer's step goes along a slot; see `Leak`."""
    return Leak(away_from, per_module, every)


def changed_fraction(region: Region | None = None, per_module: bool = False, every: int = 1) -> ChangedFraction:
    """Share of the entries that a step really moved; see `ChangedFraction`."""
    return ChangedFraction(region, per_module, every)
