"""A pass: one forward of one (sub-)batch under some transforms, and its backward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradsurgery.errors import PlanError
from gradsurgery.losses import causal_lm, model_loss
from gradsurgery.surgery.schedule import Schedule
from gradsurgery.transforms.base import ForwardTransform, Transform
from gradsurgery.transforms.stages import WeightTransform

Loss = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Tensor]
Reference = Callable[[Any, Mapping[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward under some transforms, and its backward.

    Args:
        name: Name of the pass, in results, logs and ``freeze(…, unless=name)``.
        loss: ``loss(outputs, batch, refs) -> scalar``, a mean over its tokens (a loss over other items has an
            attribute ``count(batch)``, their number); or several by name over the *one* forward, whose backwards run
            the last first, so that what a divergence keeps (last) is gone before there are two gradients. The default
            is the next token's; models that predict something else take ``gs.losses.model_loss``.
        under: Forward transforms of this pass, and keys, which are applied in this order.
        stream: Take the sub-batch ``batch[stream]``.
        rows: Take the rows that this bool column flags (``"~column"``: the others).
        weight: Factor of the loss in the backward, or ``"1/passes"``: one over the passes that run in this step.
        into: Slot that receives the gradient; with several losses, slot by loss name.
        when: Schedule (``gs.every(k)``, ``gs.sample_one(seed)``, ``gs.on_refresh()``); ``None`` runs in every step.
        keep: Optimizer steps that the slot serves once it is filled, that step included; when the pass runs again in a
            later one it is filled anew, not added to.
        refs: ``name -> reference(model, batch)``, evaluated first, in eval mode, without graph and transforms.

    Raises:
        PlanError: no name or loss, a weight that is not finite, something that is no schedule, a transform of another
            stage or one that is not linear, slots for losses that do not exist.
    """

    name: str
    loss: Loss | Mapping[str, Loss] = causal_lm
    under: Sequence[Transform] = ()
    stream: str | None = None
    rows: str | None = None
    weight: float | str = 1.0
    into: str | Mapping[str, str] = "main"
    when: Schedule | None = None
    keep: int = 1
    refs: Mapping[str, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PlanError("a pass needs a name.")
        object.__setattr__(self, "under", as_tuple(self.under, f"pass {self.name!r}: under"))
        self._check_loss()
        if self.weight != "1/passes" and (not isinstance(self.weight, (int, float)) or not math.isfinite(self.weight)):
            raise PlanError(f'pass {self.name!r}: weight is a finite number or "1/passes", not {self.weight!r}.')
        if self.when is not None and not isinstance(self.when, Schedule):
            raise PlanError(
                f"pass {self.name!r}: when takes gs.every(k), gs.sample_one(seed) or gs.on_refresh(), not "
                f"{self.when!r}."
            )
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise PlanError(f"pass {self.name!r}: keep is a positive number of optimizer steps, not {self.keep!r}.")
        for transform in self.under:
            stage = getattr(transform, "stage", None)
            if stage in ("gradient", "update"):
                where = {"gradient": "gradient=[…]", "update": "update=[…]"}[stage]
                why = "is not linear and cannot run per micro-batch, but once per optimizer step"
                if transform.traits.linear:
                    why = "acts once per optimizer step and would be wrong per micro-batch"
                raise PlanError(
                    f"{transform.describe()} {why}; move it from under=[…] of pass {self.name!r} to {where} of the "
                    f"method."
                )
            if not isinstance(transform, (ForwardTransform, WeightTransform)):
                raise PlanError(
                    f"pass {self.name!r}: {transform!r} is no transform (gs.mask, gs.scale, gs.detach, gs.zero, a key)."
                )
            if not transform.traits.linear:
                raise PlanError(
                    f"pass {self.name!r}: {transform.describe()} is not linear and would be wrong per micro-batch; "
                    f"make it a transform of the gradient stage, for gradient=[…] of the method."
                )
        if not isinstance(self.into, str) and set(self.into) != set(self.losses):
            raise PlanError(
                f"pass {self.name!r}: into names {', '.join(self.into)}, the losses are {', '.join(self.losses)}."
            )
        if self.keep > 1 and "main" in self.slots:
            raise PlanError(
                f"pass {self.name!r}: keep={self.keep} would keep .grad over steps; give the pass a slot of its own, "
                f"into=…"
            )

    def _check_loss(self) -> None:
        what = "a function loss(outputs, batch, refs), or several by name"
        if callable(self.loss):
            return
        if not isinstance(self.loss, Mapping) or not self.loss:
            raise PlanError(f"pass {self.name!r}: loss takes {what}, not {self.loss!r}.")
        for name, loss in self.loss.items():
            if not callable(loss):
                raise PlanError(f"pass {self.name!r}: loss takes {what}; {name!r} is {loss!r}.")

    @property
    def losses(self) -> dict[str, Loss]:
        return {self.name: self.loss} if callable(self.loss) else dict(self.loss)

    def factor(self, passes: int) -> float:
        """Factor of the loss in a step in which so many passes run."""
        return 1 / passes if isinstance(self.weight, str) else self.weight

    def slot(self, loss: str) -> str:
        return self.into if isinstance(self.into, str) else self.into[loss]

    @property
    def slots(self) -> frozenset[str]:
        """The slots that the pass fills."""
        return frozenset(self.slot(loss) for loss in self.losses)

    @property
    def forward_transforms(self) -> tuple[ForwardTransform, ...]:
        return tuple(t for t in self.under if isinstance(t, ForwardTransform))

    @property
    def weight_transforms(self) -> tuple[WeightTransform, ...]:
        return tuple(t for t in self.under if isinstance(t, WeightTransform))

    def columns(self) -> Iterable[str]:
        """The label columns that the pass reads."""
        if self.rows:
            yield self.rows.removeprefix("~")
        for transform in self.forward_transforms:
            where = transform.where
            for value in where.values() if isinstance(where, Mapping) else (where,):
                if isinstance(value, str):
                    yield value

    def describe(self) -> dict[str, Any]:
        """Plain data for configs: what the pass does, without tensors."""
        out: dict[str, Any] = {"name": self.name, "under": [t.describe() for t in self.under]}
        losses = {name: getattr(loss, "__name__", type(loss).__name__) for name, loss in self.losses.items()}
        out["loss"] = losses if len(losses) > 1 else next(iter(losses.values()))
        for key in ("stream", "rows"):
            if getattr(self, key):
                out[key] = getattr(self, key)
        if self.weight != 1.0:
            out["weight"] = self.weight
        if self.into != "main":
            out["into"] = self.into
        if self.when is not None:
            out["when"] = repr(self.when)
        if self.keep != 1:
            out["keep"] = self.keep
        if self.refs:
            out["refs"] = {k: r.describe() if hasattr(r, "describe") else repr(r) for k, r in self.refs.items()}
        return out


def refreshing(p: Pass, slot: str) -> Pass:
    """A pass with those of its losses alone that fill a slot, whatever its schedule."""
    losses = {name: loss for name, loss in p.losses.items() if p.slot(name) == slot}
    return dataclasses.replace(p, loss=losses, into=dict.fromkeys(losses, slot), when=None)


def as_tuple(given: Any, what: str) -> tuple[Any, ...]:
    """A list as a tuple; a `PlanError` for what somebody forgot to put into one."""
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise PlanError(f"{what} takes a list, not {type(given).__name__}: write [{describe_given(given)}].")
    return tuple(given)


def describe_given(given: Any) -> str:
    if isinstance(given, Pass):
        return f"gs.Pass({given.name!r}, …)"
    return given.describe() if isinstance(given, Transform) else repr(given)


def require_plain(p: Pass, host: str, instead: str) -> None:
    """Raise unless a pass means no more than transforms around somebody else's forward, loss and backward."""
    own = {
        "a stream": p.stream is not None,
        "rows": p.rows is not None,
        "refs": bool(p.refs),
        "a schedule": p.when is not None,
        "a weight": p.weight not in (1.0, "1/passes"),  # who owns the loop runs one pass
        "a slot": p.into != "main",
        "a loss of its own": p.loss not in (causal_lm, model_loss),
    }
    if found := [name for name, has in own.items() if has]:
        raise PlanError(f"pass {p.name!r} has {', '.join(found)}, which {host} ignores; use {instead}.")
