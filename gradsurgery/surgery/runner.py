"""One pass at a time: references, forward under its transforms, losses, a backward into each loss's slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.errors import BatchError
from gradsurgery.losses.references.base import ReadOnce, evaluating
from gradsurgery.surgery.agreement import failing_together
from gradsurgery.surgery.batches import PassBatch
from gradsurgery.surgery.hosts import recover, reduce_again, sync_every_backward
from gradsurgery.surgery.items import NumItems, items_of, per_item
from gradsurgery.surgery.passes import Loss, Pass
from gradsurgery.surgery.slots import Slots
from gradsurgery.tensors import added_after, lay_out_gradients_
from gradsurgery.transforms.engine.hooks import Switchboard
from gradsurgery.transforms.engine.plan import ForwardPlan
from gradsurgery.transforms.engine.run import Run
from gradsurgery.transforms.engine.styles import summed_apart

Backward = Callable[..., Any]


class PassRunner:
    """Runs passes on a model.

    Attributes:
        model: What is called in a forward, wrappers included.
        sync: FSDP2 reduces in every backward: what it would keep to itself meanwhile belongs to no slot, and follows
            no key.
        apart: Parameters whose ``.grad`` a tensor-parallel model sums over ranks after every backward.
        losses: By loss, the sum over its items in this step so far, and their number.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        plans: Mapping[str, ForwardPlan],
        board: Switchboard,
        slots: Slots,
        sync: bool,
    ) -> None:
        self.model, self.base, self.plans, self.board = model, base, plans, board
        self.slots, self.sync = slots, sync
        self.apart = summed_apart(base)
        self.losses: dict[str, tuple[Tensor, Any]] = {}

    def run(
        self, p: Pass, share: PassBatch, passes: int, num_items: NumItems | None, backward: Backward | None
    ) -> dict[str, Tensor]:
        """Run a pass on its share of a batch; returns detached fp32 losses."""
        with failing_together(self.base, self.model, f"a reference of pass {p.name!r}") if p.refs else nullcontext():
            refs = self._references(p, share)
        together = not any(getattr(loss, "collective", False) for loss in p.losses.values())
        parameters = dict(self.base.named_parameters())
        out: dict[str, Tensor] = {}
        run = run_of(share.columns, passes, share.inputs)
        with ExitStack() as stack:
            for transform in p.weight_transforms:
                stack.enter_context(transform.during(self.base, self.slots))
            if p.forward_transforms:
                stack.enter_context(self.board.on(self.plans[p.name], run))
            stack.push(self._recover)  # first of all on an exception: keys go back into what is sharded
            if self.sync:
                sync_every_backward(self.base)
            outputs = self.model(**share.inputs)
            self.board.check_called(self.model)
            whole = failing_together(self.base, self.model, f"pass {p.name!r}") if together else nullcontext()
            with whole:  # in C2, say, and no rank is left there
                losses = {name: loss(outputs, share.batch, lent(refs, p, loss)) for name, loss in p.losses.items()}
                for name, loss in losses.items():
                    require_finite(name, loss)
            del outputs, refs  # logits that no loss saved need not live through the backward
            while losses:  # the last first: what it alone keeps goes before a second gradient is there
                name, loss = losses.popitem()
                factor: Any = p.factor(passes) * share.share
                items: Any = 1.0
                if num_items is not None:
                    items = items_of(p.losses[name], share, self.base).to(loss.device)
                    part = per_item(items, num_items, name)
                    factor = p.factor(passes) * part.to(torch.promote_types(loss.dtype, torch.float32))
                scaled = loss if isinstance(factor, float) and factor == 1.0 else loss * factor
                more = {"retain_graph": True} if losses else {}
                apart = [parameters[own] for own in self.apart]
                with self.slots.installed(p.slot(name), parameters), added_after(apart):
                    (backward or Tensor.backward)(scaled, **more)
                    lay_out_gradients_(parameters.values())
                    if out:
                        reduce_again(self.model, parameters.values())
                out[name] = loss.detach().float() * share.share
                self._record(name, out[name], items)
        return {name: out[name] for name in p.losses}

    def _recover(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            recover(self.base)

    def _record(self, name: str, loss: Tensor, items: Any) -> None:
        """Mean over the window's items, for the metrics."""
        total, count = self.losses.get(name, (torch.zeros_like(loss), 0.0))
        self.losses[name] = (total + loss * items, count + items)

    def _references(self, p: Pass, share: PassBatch) -> dict[str, Any]:
        if not p.refs:
            return {}
        with evaluating(self.base):
            return {name: reference(self.model, inputs_of(reference, share)) for name, reference in p.refs.items()}


def lent(refs: dict[str, Any], p: Pass, loss: Loss) -> dict[str, Any]:
    """The references for a loss; where others keep the graph, it can let go of them in its one backward."""
    return ReadOnce(refs) if len(p.losses) > 1 and getattr(loss, "backwards", 1) == 1 else refs


def inputs_of(reference: Any, share: PassBatch) -> dict[str, Any]:
    """The model's inputs, and what else of the batch a reference reads (row numbers)."""
    more = {name: share.batch[name] for name in getattr(reference, "columns", ()) if name in share.batch}
    return {**share.inputs, **more}


def run_of(columns: Mapping[str, Tensor], passes: int, batch: Mapping[str, Any]) -> Run:
    """What hooks need to know about a pass over a batch; its ``(batch, tokens)`` where one length is all it has."""
    given = [batch.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels")]
    shapes = {(x.shape[0], x.shape[1]) for x in given if isinstance(x, Tensor) and x.dim() > 1}
    return Run(columns, passes, shape=shapes.pop() if len(shapes) == 1 else None)


def require_finite(name: str, loss: Tensor) -> None:
    """Refuse a loss that is nan or inf before its backward spoils the gradient (on the CPU: it would synchronise)."""
    if loss.device.type == "cpu" and not torch.isfinite(loss).all():
        raise BatchError(
            f"the loss of {name!r} is {loss.item()}: the batch holds nan or inf, or training has diverged."
        )
