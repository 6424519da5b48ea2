"""What a quarantine takes, in the metrics of every step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gradsurgery.adapters.handle import Handle
from gradsurgery.adapters.score import Score
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.surgery.stepping import region_norm
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.stages import StepContext, UpdateTransform


@dataclass(frozen=True, eq=False)
class Figures(UpdateTransform):
    """Carries what routing and losses left among an adapter's figures into the metrics."""

    adapter: Handle
    traits = Traits()

    def regions(self) -> Iterable[Region]:
        return (self.adapter.kept, self.adapter.quarantine)

    def prepare(self, context: StepContext, state: dict[str, Any]) -> None:
        context.metrics.update(self.adapter.figures)

    def describe(self) -> str:
        return "figures of the quarantine"


@dataclass(frozen=True, eq=False)
class Meter(Figures):
    """``quarantine/energy = |g_q| / (|g_k| + |g_q|)``, with ``quarantine/capacity``, the ratio of the parts' sizes.

    An energy far above ``capacity / (1 + capacity)`` says that the quarantine learns what was not flagged.
    """

    def prepare(self, context: StepContext, state: dict[str, Any]) -> None:
        super().prepare(context, state)
        assert context.model is not None
        kept, quarantined = (region_norm(context.model, region) for region in self.regions())
        total = kept + quarantined
        context.metrics["quarantine/energy"] = quarantined / total.clamp(min=1e-30)
        context.metrics["quarantine/capacity"] = self.adapter.quarantine.numel() / self.adapter.kept.numel()

    def describe(self) -> str:
        return "energy of the quarantine"


@dataclass(frozen=True, eq=False)
class ScoreMeter(Meter):
    """Also carries the score's buffer in the surgery's state."""

    score: Score | None = None
    traits = Traits(stateful=True)

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        return {} if self.score is None else self.score.state
