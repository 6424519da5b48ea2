"""Quarantine: what flagged rows teach goes into a part of an adapter that is thrown away.

Gradient routing: Cloud et al. 2024, arXiv 2410.04332; selective masking: Shilov et al. 2025, arXiv 2512.05648; routing
by a vector and one-sided erasing: wassname, evil_MoE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from gradsurgery.adapters.handle import Handle
from gradsurgery.adapters.kinds import ByKind, Kinds
from gradsurgery.adapters.meter import Figures, Meter, ScoreMeter
from gradsurgery.adapters.route import Route
from gradsurgery.adapters.score import Score
from gradsurgery.adapters.scored import Scored
from gradsurgery.adapters.toward import Toward
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.estimators.direction import Direction
from gradsurgery.losses import causal_lm
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.dry_run import DryRun
from gradsurgery.surgery.passes import Loss
from gradsurgery.transforms import freeze, project
from gradsurgery.transforms.engine.plan import ForwardPlan, is_tokens_first


def quarantine(
    adapter: Handle,
    mode: Literal["route", "absorb", "erase"] = "route",
    where: str | Tensor | None = "flag",
    score: Score | None = None,
    clean: str | None = None,
    direction: Direction | None = None,
    loss: Loss = causal_lm,
    metrics: bool = True,
    kinds: Kinds | None = None,
) -> Method:
    """One pass in which flagged rows teach the quarantine, and others the kept part.

    * ``"route"``: the forward has both parts, for all rows. Flagged rows send the kept part's weights nothing, bit for
      bit; other rows train both.
    * ``"absorb"``: the quarantine is there for flagged rows alone, forward and backward; the kept part keeps its value
      there and is detached. With ``clean``, rows that are neither flagged nor clean run and train both parts.
    * ``"erase"``: no quarantine (it is frozen). In the gradient stage what the kept part's gradient has along
      ``direction`` is taken out, tensor by tensor, where it would teach what is not wanted.

    Attach it to ``adapter.host``. Generate, and evaluate references, inside ``surgery.running("generate")`` and
    ``adapter.without("quarantine")``. At the end, ``adapter.ablate_()``.

    With a score one step is a forward, a backward that reads it, and (``"route"``) the routed backward through the same
    graph; ``"absorb"`` decides what its forward is, and so takes a second one. Scores need checkpointing without
    reentry (``use_reentrant=False``).

    Args:
        adapter: From `gs.adapters.add` or `gs.adapters.from_peft`.
        mode: As above.
        where: Label column ``[batch]`` or ``[batch, token]`` of the flagged rows (or a bool tensor). With a score a row
            is flagged by both; ``None`` leaves it to the score. ``"erase"`` reads no column.
        score: A `gs.adapters.Score`.
        clean: ``"absorb"``: column of the rows without the quarantine; by default those that are not flagged.
        direction: ``"erase"``: from `gs.estimators.paired_direction`.
        loss: Loss of the pass.
        metrics: Measure each step's energy into the quarantine, beside the capacity ratio (an update stage, so that the
            optimizer must be bound).
        kinds: A `gs.adapters.Kinds`: metrics apart for each kind of row.

    Raises:
        PlanError: options that do not go together.
        ArtefactError: a direction of another adapter, or one that is zero.

    Example:
        >>> adapter = gs.adapters.add(model, "all-linear", rank=4)
        >>> surgery = gs.attach(gs.methods.quarantine(adapter), adapter.host, torch.optim.AdamW(adapter.parameters()))
        >>> losses = surgery.backward({**batch, "flag": torch.tensor([True, False])})
        >>> surgery.remove(), adapter.ablate_(), adapter.remove()
        (None, None, None)
    """
    if not isinstance(adapter, Handle):
        raise PlanError(f"quarantine takes an adapter (gs.adapters.add), not {type(adapter).__name__}.")
    if kinds is not None and not (isinstance(kinds, Kinds) and metrics):
        raise PlanError("quarantine: kinds is a gs.adapters.Kinds, of metrics that are on.")
    if mode == "erase":
        erased = RoutedPass("quarantine", loss, kinds=kinds, adapter=adapter)
        return _erase(adapter, score, clean, direction, erased, metrics)
    if direction is not None:
        raise PlanError('quarantine: direction is for mode="erase"; a score has its own.')
    route = Route(adapter, mode, where, clean, score)
    meter = ScoreMeter(adapter, score) if score is not None else Meter(adapter)
    update = [meter] if metrics or score else []
    return Quarantine([RoutedPass("quarantine", loss, under=[route], kinds=kinds, adapter=adapter)], update=update)


def _erase(adapter: Handle, score: Any, clean: Any, direction: Direction | None, erased: Pass, metrics: bool) -> Method:
    if score is not None or clean is not None:
        raise PlanError('quarantine: mode="erase" acts on the gradient of all rows and takes no score and no column.')
    if not isinstance(direction, Direction):
        raise PlanError('quarantine: mode="erase" needs direction=…, from gs.estimators.paired_direction.')
    along = project(
        "main",
        away_from=Toward(adapter, direction),
        remove="agreement",
        scope="tensor",
        region=adapter.kept,
        metrics="global" if metrics else None,
    )
    figures = [Figures(adapter)] if metrics else []
    return Method([erased], gradient=[along], update=[freeze(adapter.quarantine), *figures])


@dataclass(frozen=True, eq=False)
class RoutedPass(Pass):
    """A pass of an adapter, whose rows may be routed; a score is read between its forward and its backward.

    Args:
        kinds: Kinds of rows that are measured apart.
        adapter: Whose figures hold that.
    """

    kinds: Kinds | None = None
    adapter: Handle | None = None

    @property
    def route(self) -> Route | None:
        return next((t for t in self.under if isinstance(t, Route)), None)

    @property
    def losses(self) -> dict[str, Loss]:
        found, route = super().losses, self.route
        if route is not None and route.score is not None:
            found = {name: Scored(one, route) for name, one in found.items()}
        if self.kinds is not None and self.adapter is not None:
            found = {name: ByKind(one, self.adapter, self.kinds, route) for name, one in found.items()}
        return found

    def columns(self) -> Iterable[str]:
        yield from super().columns()
        if self.route is not None and self.route.clean is not None:
            yield self.route.clean


class Quarantine(Method):
    """A method with routed passes: it knows their handlers, which no region of a model tells."""

    def validate(self, model: nn.Module) -> dict[str, ForwardPlan]:
        model = unwrap(model)
        routes = {p.name: [t for t in p.under if isinstance(t, Route)] for p in self.passes}
        for route in (route for found in routes.values() for route in found):
            if route.adapter.host is not model:
                raise PlanError(
                    "a quarantine is attached to what holds the model and its adapter: gs.attach(method, adapter.host, "
                    "optimizer); sharding and DDP take adapter.host, too."
                )
            if not getattr(route.adapter, "attached", True):
                raise PlanError("this quarantine's adapter was removed from its model; add another.")
        plain = [
            dataclasses.replace(p, under=[t for t in p.under if not isinstance(t, Route)], loss=p.loss)
            for p in self.passes
        ]
        plans = Method(plain, self.gradient, self.update).validate(model)
        modules = dict(model.named_modules())
        for name, found in routes.items():
            for route in found:
                layers = route.adapter.roles.layers
                for path, handlers in route.handlers().items():
                    plans[name].handlers[path] = [*handlers, *plans[name].handlers.get(path, [])]
                    if is_tokens_first(modules, layers[path]):
                        plans[name].tokens_first |= {path}
        return plans

    def dry_run(self, model: nn.Module, batch: Mapping[str, Any]) -> DryRun:
        """As `Method.dry_run`; what scores remember is left alone."""
        scores = [t.score for p in self.passes for t in p.under if isinstance(t, Route) and t.score is not None]
        before = [dict(score.state) for score in scores]
        try:
            return super().dry_run(model, batch)
        finally:
            for score, state in zip(scores, before, strict=True):
                score.state.clear()
                score.state.update(state)
