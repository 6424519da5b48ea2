"""Several gradients made one, from their Gram matrix alone, which is streamed over parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import PlanError, SlotError
from gradsurgery.tensors import local_of, subtract_
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.projection import grads
from gradsurgery.transforms.projection.layout import Part, parts_of
from gradsurgery.transforms.projection.measure import part_products
from gradsurgery.transforms.projection.targets import flat_of
from gradsurgery.transforms.stages import GradientTransform, StepContext
from gradsurgery.transforms.weightings import NAMED, Weighting


@dataclass(frozen=True)
class Aggregate(GradientTransform):
    """``into <- sum_t w_t g_t``, with ``w = weighting(G)`` and ``G[s, t] = <g_s, g_t>`` over all entries that may move.

    A parameter without a gradient in a slot counts as zero there. The slots themselves stay as they are, except
    ``into``, in which the sum is made.

    Args:
        weighting: ``"sum"``, ``"mean"``, ``"pcgrad"``, ``"mgda"``, or a function from the Gram matrix (fp64
            ``[tasks, tasks]``, on the host) to weights ``[tasks]``: a `gs.PCGrad`, any weighting of TorchJD that takes
            a Gramian.
        slots: The gradients, in order; ``None`` for all that this step filled, ``"main"`` first.
        into: Slot that receives the sum.

    Raises:
        PlanError: an unknown name, or something that is no weighting.
        SlotError: in the step: slots that were not filled, nan or inf in them, weights of another number or not finite.

    Example:
        >>> tasks = [gs.Pass("forget", rows="forget", into="a"), gs.Pass("retain", rows="retain", into="b")]
        >>> method = gs.Method(tasks, gradient=[gs.aggregate("pcgrad")])
    """

    weighting: str | Weighting = "sum"
    slots: Sequence[str] | None = None
    into: str = "main"
    traits = Traits()

    def __post_init__(self) -> None:
        if isinstance(self.weighting, str) and self.weighting not in NAMED:
            raise PlanError(f"aggregate knows {', '.join(map(repr, NAMED))}, and functions; not {self.weighting!r}.")
        if not isinstance(self.weighting, str) and not callable(self.weighting):
            raise PlanError(f"aggregate takes a name or a function of the Gram matrix, not {self.weighting!r}.")
        if isinstance(self.slots, str):
            raise PlanError(f"aggregate: slots takes a list, not {self.slots!r}: write [{self.slots!r}].")
        if self.slots is not None:
            object.__setattr__(self, "slots", tuple(self.slots))
            if not self.slots or len(set(self.slots)) < len(self.slots):
                raise PlanError(f"aggregate: slots are some different names, not {list(self.slots)}.")

    def reads(self) -> Iterable[str]:
        return self.slots or ()

    def fills(self) -> Iterable[str]:
        return (self.into,)

    @torch.no_grad()
    def apply(self, context: StepContext, state: dict[str, Any]) -> None:
        given = self._gradients(context)
        vectors = list(given.values())
        parts = parts_of(context, None, context.frozen, state.setdefault("parts", {}))

        def columns(part: Part) -> list[Any]:
            return [flat_of(v.get(part.name), part.boxes) for v in vectors]

        gram = part_products(parts, columns, len(vectors), context.parameters).sum(0)
        if not bool(torch.isfinite(gram).all()):
            grads.require_finite(given, self.describe())
        weights = self._weights(gram, list(given), context.step)
        for k, slot in enumerate(given):
            context.metrics[f"aggregate/{slot}"] = weights[k]
        target = self._target(context, given)
        made = {}
        for name in dict.fromkeys(name for v in vectors for name in v):
            mine = target.get(name)
            if mine is None:
                like = next(v[name] for v in vectors if name in v)
                mine = made[name] = torch.zeros_like(like)
            others = [(v[name], -w) for v, w in zip(vectors, weights, strict=True) if name in v and v[name] is not mine]
            keep = next((w for v, w in zip(vectors, weights, strict=True) if v.get(name) is mine), 0.0)
            subtract_(local_of(mine), [local_of(v) for v, _ in others], [w for _, w in others], keep)
        grads.write(context, self.into, made)

    def _gradients(self, context: StepContext) -> dict[str, dict[str, Tensor]]:
        names = self.slots
        if names is None:
            has_main = any(p.grad is not None for p in context.parameters.values())
            names = [*(["main"] if has_main else []), *context.slots]
        if not names:
            raise SlotError(f"{self.describe()}: no slot was filled in this step; call surgery.backward before it.")
        return {slot: grads.read(context, slot, self.describe()) for slot in names}

    def _weights(self, gram: Tensor, slots: Sequence[str], step: int) -> list[float]:
        function: Any = NAMED[self.weighting] if isinstance(self.weighting, str) else self.weighting
        found = function(gram, step=step) if getattr(function, "takes_step", False) else function(gram)
        found = torch.as_tensor(found, dtype=torch.float64).detach().reshape(-1)
        if len(found) != len(slots) or not bool(torch.isfinite(found).all()):
            raise SlotError(
                f"{self.describe()} made the weights {found.tolist()} for the slots {', '.join(slots)}; they must be "
                f"{len(slots)} finite numbers."
            )
        return [float(w) for w in found]

    def _target(self, context: StepContext, given: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.into in given:
            return given[self.into]
        there = self.into == "main" or self.into in context.slots
        if not there:
            return {}
        if self.into == "main":
            return {name: p.grad for name, p in context.parameters.items() if p.grad is not None}
        return dict(context.slots[self.into])

    def describe(self) -> str:
        how = self.weighting if isinstance(self.weighting, str) else type(self.weighting).__name__
        if hasattr(self.weighting, "__dataclass_fields__"):
            how = repr(self.weighting)
        which = "all slots" if self.slots is None else ", ".join(self.slots)
        return f"aggregate({how}, {which} into {self.into!r})"


def aggregate(weighting: str | Weighting = "sum", slots: Sequence[str] | None = None, into: str = "main") -> Aggregate:
    """Combine slots by weights that are a function of their Gram matrix; see `Aggregate`."""
    return Aggregate(weighting, slots, into)
