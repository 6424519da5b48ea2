"""Projection: one gradient kept clear of another.

g' = g - <g, r> / <r, r> r, by blocks of parameters, and its one-sided and subspace variants (OGD: Farajtabar et al.
2020, arXiv 1910.07104; GEM: Lopez-Paz & Ranzato 2017, arXiv 1706.08840; PCGrad: Yu et al. 2020, arXiv 2001.06782).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError
from gradsurgery.transforms.projection import grads
from gradsurgery.transforms.projection.blocks import NotFinite
from gradsurgery.transforms.projection.layout import layout_of
from gradsurgery.transforms.projection.options import Projection, Remove, Scope
from gradsurgery.transforms.projection.report import note
from gradsurgery.transforms.projection.targets import Moved, Target
from gradsurgery.transforms.projection.work import Work
from gradsurgery.transforms.stages import GradientTransform, StepContext, UpdateTransform


class Project(Projection, GradientTransform):
    """`project` of a slot, once per optimizer step, on the accumulated and reduced gradient."""

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        return {"layout": {}}

    @torch.no_grad()
    def apply(self, context: StepContext, state: dict[str, Any]) -> None:
        layout = layout_of(self, context, state["layout"])
        slot = grads.read(context, self.slot, self.describe())
        vectors = grads.vectors_of(context, self.sources, self.describe())
        if not vectors:
            return  # a memory that is still empty protects nothing
        target = Target(slot, lambda name: grads.zeros_like(context, name, slot, vectors))
        parked = None
        if self.park is not None:
            held = dict(context.slots[self.park]) if self.park in context.slots else {}
            parked = Target(held, lambda name: grads.zeros_like(context, name, slot, vectors))
        work = Work(self, layout, target, vectors, context.parameters)
        run(self, work, context, slot, vectors, parked)
        grads.write(context, self.slot, target.made)
        if parked is not None and self.park is not None:
            grads.write(context, self.park, parked.made)


class ProjectUpdate(Projection, UpdateTransform):
    """`project` of the way that the parameters went in the optimizer's step."""

    outer = 1

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        return {"layout": {}}

    @torch.no_grad()
    def before_step(self, context: StepContext, state: dict[str, Any]) -> None:
        self.skip(state)
        layout = layout_of(self, context, state["layout"])
        vectors = grads.vectors_of(context, self.sources, self.describe())
        if not vectors:
            return
        moved = Moved(context.parameters, [*layout.parts, *layout.rows])
        state["work"] = Work(self, layout, moved, vectors, context.parameters)

    @torch.no_grad()
    def after_step(self, context: StepContext, state: dict[str, Any]) -> None:
        work = state.pop("work", None)
        if work is not None:
            run(self, work, context, {}, work.vectors, None)

    def skip(self, state: dict[str, Any]) -> None:
        state.pop("work", None)


def run(
    options: Projection,
    work: Work,
    context: StepContext,
    slot: Mapping[str, Tensor],
    vectors: Sequence[Mapping[str, Tensor]],
    parked: Target | None,
) -> None:
    """Project and note the metrics; nan and inf are an error that says where they lie."""
    try:
        work.run(parked)
    except NotFinite:
        named = [s if isinstance(s, str) else "memory" for s in options.sources]
        labels = named if len(named) == len(vectors) else [f"{options.label}[{k}]" for k in range(len(vectors))]
        found = {options.slot: slot, **dict(zip(labels, vectors, strict=True))}
        grads.require_finite({k: v for k, v in found.items() if v}, options.describe())
    note(options, work, context)


def project(
    slot: str = "main",
    away_from: Any = "protect",
    *,
    remove: Remove = "both",
    scope: Scope = "global",
    region: Region | Sequence[Region] | None = None,
    park: str | None = None,
    at: Literal["gradient", "update"] = "gradient",
    energy: float = 1.0,
    max_cosine: float = 1.0,
    keep_weight: float = 1.0,
    removed_weight: float = 1.0,
    floor: float = 0.0,
    metrics: Literal["global", "module"] | None = None,
) -> Any:
    """Take the component of one gradient along another out.

    For every block of the scope, with g the slot and r the reference there: ``s = <g, r> / <r, r>`` and
    ``g' = keep_weight * g - removed_weight * s * r``. Several references span a subspace: ``s = R⁺c`` with their Gram
    matrix R and ``c_i = <g, r_i>``. Sums are kept in fp64, coefficients are solved in fp64 on the host; sharded
    gradients reduce those sums alone.

    Entries take part that the step may move: of parameters that train and that the bound optimizer holds, without those
    that ``gs.freeze`` holds in this step. A parameter without a gradient in one of the slots counts as zero there, and
    gets one where something is to be removed.

    Args:
        slot: What is projected; ``"main"`` is ``.grad``.
        away_from: Name of a slot, an object with ``.vectors`` (mappings from parameter name to tensor), or several.
        remove: ``"both"`` always removes. ``"conflict"`` removes what works against the reference: where
            ``<g, r> < 0``, or, for an update, where ``<delta, r> > 0`` (uphill on its loss). ``"agreement"`` removes
            the reverse. With several references, the nearest g' without conflict (agreement) with any, as in GEM.
        scope: ``"global"``: one block. ``"region"``: one for each given region. ``"module"``: the parameters of one
            module. ``"tensor"``. ``"row"``: each index of dimension 0; vectors are one block.
        region: Entries outside are neither read nor changed; one region or several. ``None``: all that trains.
        park: Slot that receives what was removed, added to what it holds; made if absent.
        at: ``"gradient"``; or ``"update"``: the delta of the parameters over the optimizer's step, with its momentum
            and decay, is projected after it, as exactly as the gaps between stored weights allow: |cos| of 1e-7 in
            fp32. Momenta keep what they know. Costs a copy of the projected entries.
        energy: Share of the references' squared singular values that the removed subspace holds.
        max_cosine: A larger ``|cos(g, r)|`` counts as this one (GRU: Wang et al. 2025, arXiv 2503.09117).
        keep_weight: Weight of g.
        removed_weight: Weight of what is removed.
        floor: Where ``|r| <= floor * |g|`` in a block, nothing is removed.
        metrics: ``"global"`` adds ``project/<slot>/<away_from>/`` ``cosine_before``, ``cosine_after`` and
            ``norm_removed`` (a share of ``|g|``) to ``surgery.metrics()``; ``"module"`` adds them by module, too.
            Always there is ``project/<away_from>/vanished``: blocks whose references are zero, or below the floor.

    Returns:
        A `Project` for ``gradient=[…]``, or with ``at="update"`` a `ProjectUpdate` for ``update=[…]``.

    Raises:
        PlanError: an option that is unknown, out of range, or does not go with another.
        SlotError: in the step: a slot that was not filled, or holds nan or inf.

    Example:
        >>> losses = {"sft": gs.losses.causal_lm, "kl": gs.losses.kl_divergence}
        >>> reference = gs.losses.snapshot(gs.region(model, "*"))
        >>> both = gs.Pass("both", losses, into={"sft": "main", "kl": "protect"}, refs={"reference": reference})
        >>> method = gs.Method([both], gradient=[gs.project("main", away_from="protect")])
    """
    if at not in ("gradient", "update"):
        raise PlanError(f"project: at is 'gradient' or 'update', not {at!r}.")
    if at == "update" and slot != "main":
        raise PlanError(f"project: an update is of the parameters, not of slot {slot!r}; leave slot='main'.")
    if at == "update" and park is not None:
        raise PlanError("project: what is removed from an update is no gradient, so it cannot be parked.")
    make = Project if at == "gradient" else ProjectUpdate
    return make(
        slot=slot,
        away_from=away_from,
        remove=remove,
        scope=scope,
        region=region,
        park=park,
        energy=energy,
        max_cosine=max_cosine,
        keep_weight=keep_weight,
        removed_weight=removed_weight,
        floor=floor,
        metrics=metrics,
    )
