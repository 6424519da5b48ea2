"""A method: passes, then the gradient stage, then the update stage, as immutable data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from gradsurgery.anatomy.space import ParameterSpace, require_same_space, unwrap
from gradsurgery.errors import PlanError, SelectionError
from gradsurgery.losses import causal_lm
from gradsurgery.surgery.passes import Pass, as_tuple
from gradsurgery.transforms.base import InputEffect
from gradsurgery.transforms.clip import Clip
from gradsurgery.transforms.engine.plan import ForwardPlan
from gradsurgery.transforms.freeze import Freeze
from gradsurgery.transforms.stages import GradientTransform, UpdateTransform

if TYPE_CHECKING:
    from gradsurgery.surgery.dry_run import DryRun


@dataclass(frozen=True, eq=False)
class Method:
    """What happens in one optimizer step.

    Args:
        passes: Run one after the other, each into its slot.
        gradient: Transforms of the accumulated gradient, in order; ``gs.clip`` last.
        update: Transforms around the optimizer step.

    Raises:
        PlanError: no pass, names twice, transforms at the wrong stage.

    Example:
        >>> forget = anatomy.heads[:, -1:] | anatomy.neurons[:, -16:]
        >>> mask, zero = gs.mask(anatomy.rest(forget), where="forget"), gs.zero(forget, where="retain")
        >>> method = gs.Method([gs.Pass("sgtm", under=[mask, zero])], gradient=[gs.clip(1.0)])
    """

    passes: Sequence[Pass]
    gradient: Sequence[GradientTransform] = ()
    update: Sequence[UpdateTransform] = ()

    def __post_init__(self) -> None:
        for field in ("passes", "gradient", "update"):
            object.__setattr__(self, field, as_tuple(getattr(self, field), f"Method: {field}"))
        if not self.passes:
            raise PlanError("a method needs at least one pass.")
        for p in self.passes:
            if not isinstance(p, Pass):
                raise PlanError(f"Method: passes=[…] takes gs.Pass, not {type(p).__name__}.")
        names = [p.name for p in self.passes]
        if len(set(names)) < len(names):
            raise PlanError(f"passes need different names, these are {', '.join(names)}.")
        losses = [loss for p in self.passes for loss in p.losses]
        if len(set(losses)) < len(losses):
            raise PlanError(f"the losses of a method need different names, these are {', '.join(losses)}.")
        for field, kind in (("gradient", GradientTransform), ("update", UpdateTransform)):
            for transform in getattr(self, field):
                if not isinstance(transform, kind):
                    stage = getattr(transform, "stage", "no")
                    raise PlanError(f"{transform!r} belongs to the {stage} stage and cannot stand in {field}=[…].")
        for transform in self.gradient[:-1]:
            if isinstance(transform, Clip):
                raise PlanError("gs.clip must come last in gradient=[…]: what follows it would change the norm again.")
        self._check_slots()
        for transform in self.update:
            if isinstance(transform, Freeze) and not set(transform.passes) <= set(names):
                raise PlanError(f"{transform.describe()} names no pass of this method: they are {', '.join(names)}.")

    def _check_slots(self) -> None:
        known = {"main", *self.slots, *self.keep}
        for transform in (*self.gradient, *self.update):
            for slot in transform.reads():
                if slot not in known:
                    raise PlanError(
                        f"{transform.describe()} needs slot {slot!r}, which nothing fills; the slots there are: "
                        f"{', '.join(sorted(known))}. Give a pass into={slot!r}."
                    )
            known.update(transform.fills())

    @property
    def keep(self) -> dict[str, int]:
        """Optimizer steps that each slot serves, where that is more than one."""
        found: dict[str, int] = {}
        for p in self.passes:
            for slot in p.slots:
                if found.setdefault(slot, p.keep) != p.keep:
                    raise PlanError(
                        f"passes keep slot {slot!r} for {found[slot]} and for {p.keep} steps; give one keep."
                    )
        return {slot: steps for slot, steps in found.items() if steps > 1}

    @property
    def columns(self) -> frozenset[str]:
        """The label columns that batches must bring."""
        return frozenset(column for p in self.passes for column in p.columns())

    @property
    def slots(self) -> frozenset[str]:
        """The slots that passes fill."""
        return frozenset(slot for p in self.passes for slot in p.slots)

    def validate(self, model: nn.Module) -> dict[str, ForwardPlan]:
        """Check the method against a model; returns the forward plan of every pass.

        Raises:
            SelectionError: a region of another model, empty, or without an entry that trains.
            PlanError: a layer that cannot do what is asked; ``causal_lm`` for a model that predicts no next token.
        """
        model = unwrap(model)
        space = ParameterSpace.of(model)
        trains = {space.canonical(name) for name, p in model.named_parameters() if p.requires_grad}
        for transform in (*self.gradient, *self.update):
            for region in transform.regions():
                require_same_space(region.space, space, f"{transform.name}: region {region.text or 'given'}")
                if trains.isdisjoint(region.entries):
                    raise SelectionError(f"{transform.describe()} holds no entry that trains, so nothing would happen.")
        for p in self.passes:
            check_pass(p, model)
            for swap in p.weight_transforms:
                swap.check(model)
        return {p.name: ForwardPlan(model, p.forward_transforms) for p in self.passes}

    def explain(self, model: nn.Module) -> str:
        """What runs, where, on how many entries: one line a transform."""
        plans = self.validate(model)
        lines = []
        for p in self.passes:
            facts = [f"loss {describe_losses(p)}", f"into {p.into}"]
            facts += [f"stream {p.stream!r}"] if p.stream else []
            facts += [f"rows {p.rows!r}"] if p.rows else []
            facts += [f"when {p.when}"] if p.when else []
            facts += [f"kept for {p.keep} steps"] if p.keep > 1 else []
            lines.append(f"pass {p.name!r}: {', '.join(facts)}; one forward, {len(p.losses)} backward")
            for transform in p.under:
                lines.append(f"  {transform.describe()}: {_sizes(transform)}")
            kinds: dict[str, int] = {}
            for handlers in plans[p.name].handlers.values():
                for handler in handlers:
                    kinds[type(handler).__name__] = kinds.get(type(handler).__name__, 0) + 1
            rerun = kinds.pop("RerunHandler", 0)
            lines.append(
                f"  acts on {sum(kinds.values()) + rerun} modules"
                + (f", {rerun} of them run once per row class" * bool(rerun))
            )
        for stage in ("gradient", "update"):
            for transform in getattr(self, stage):
                lines.append(f"{stage}: {transform.describe()}: {_sizes(transform)}".rstrip(": "))
        return "\n".join(lines)

    def describe(self) -> dict[str, Any]:
        """Plain data for run configs: regions in their text form."""
        out: dict[str, Any] = {"passes": [p.describe() for p in self.passes]}
        for stage in ("gradient", "update"):
            if getattr(self, stage):
                out[stage] = [t.describe() for t in getattr(self, stage)]
        return out

    def dry_run(self, model: nn.Module, batch: Mapping[str, Any]) -> DryRun:
        """Which entries one step on this batch would send gradient to; model and gradients are left as they were."""
        from gradsurgery.surgery.dry_run import dry_run

        return dry_run(self, model, batch)

    def __str__(self) -> str:
        return json.dumps(self.describe(), indent=1)


def check_pass(p: Pass, model: nn.Module) -> None:
    """Raise where a pass's loss, or a detach, means nothing on a model."""
    if causal_lm in p.losses.values() and not predicts_next_token(model):
        raise PlanError(
            f"pass {p.name!r} trains causal_lm, and {type(model).__name__} does not predict the next token; give it "
            f"loss=gs.losses.model_loss, or a loss of your own."
        )
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    for transform in p.forward_transforms:
        if any(isinstance(effect, InputEffect) and effect.kind == "detach" for effect in transform.effects()):
            raise SelectionError(f"{transform.describe()} stops gradients, and no parameter of the model trains.")


def predicts_next_token(model: nn.Module) -> bool:
    """Whether logits at a position are of the token after it; plain modules, of which nothing is known, pass."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if not re.search("For[A-Z]", type(model).__name__) or "ForCausalLM" in type(model).__name__:
        return True
    can_generate = getattr(model, "can_generate", None)
    return can_generate is None or bool(can_generate())


def references_of(method: Method) -> dict[str, Any]:
    """What losses compare with, by ``pass: name``; what several of them share comes once."""
    found = {f"{p.name}: {name}": getattr(r, "source", r) for p in method.passes for name, r in p.refs.items()}
    return {key: r for k, (key, r) in enumerate(found.items()) if all(r is not x for x in list(found.values())[:k])}


def describe_losses(p: Pass) -> str:
    return " and ".join(getattr(loss, "__name__", type(loss).__name__) for loss in p.losses.values())


def _sizes(transform: Any) -> str:
    return ", ".join(f"{r.numel():,} entries ({100 * r.fraction:.2f}% of the model)" for r in transform.regions())
