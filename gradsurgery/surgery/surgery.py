"""The handle that runs a method: backward passes under their transforms, then the stages around the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import BatchError, PlanError, SlotError
from gradsurgery.keys.configuration import require_c1
from gradsurgery.surgery.agreement import failing_together, require_agreement
from gradsurgery.surgery.batches import PassBatch, batch_for, label_columns
from gradsurgery.surgery.checkpoint import state_of, take_state
from gradsurgery.surgery.hosts import Buffers, check_backward, check_host, has_several_backwards
from gradsurgery.surgery.items import NumItems, count_items
from gradsurgery.surgery.method import Method
from gradsurgery.surgery.passes import Pass, refreshing, require_plain
from gradsurgery.surgery.runner import Backward, PassRunner, run_of
from gradsurgery.surgery.slots import Probe, Slots
from gradsurgery.surgery.stepping import Stepper
from gradsurgery.tensors import added_after, reshard
from gradsurgery.transforms.engine.hooks import Switchboard, is_compiled


class Surgery:
    """A method at work on a model. Made by `gs.attach`.

    Attributes:
        method: The method.
        model: What is called in a forward; wrappers put around the model later (DDP, ``torch.compile``) are set here.
        slots: Named gradients of the running step.
        step: Optimizer steps done.
    """

    def __init__(self, method: Method, model: nn.Module) -> None:
        self.method, self.base = method, unwrap(model)
        check_host(model, method.slots)
        self._plans = method.validate(model)
        self._board = Switchboard(model, self._plans.values())
        self._stepper = Stepper(method, self.base)
        self.slots = Slots(method.keep)
        several = method.slots != {"main"} or any(p.weight_transforms for p in method.passes)
        self._passes = PassRunner(model, self.base, self._plans, self._board, self.slots, several)
        self._buffers = Buffers() if any(has_several_backwards(p) for p in method.passes) else None
        self._enabled = True
        self._had_main = False
        self._agreed = False
        self._first = True
        self.attached = True

    @property
    def model(self) -> nn.Module:
        return self._passes.model

    @model.setter
    def model(self, host: nn.Module) -> None:
        if host is self._passes.model:
            return
        if unwrap(host) is not self.base:
            raise PlanError(f"surgery.model takes the attached {type(self.base).__name__} or a wrapper around it.")
        check_host(host, self.method.slots)
        self._agreed = False
        self._passes.model = host

    @property
    def step(self) -> int:
        return self._stepper.step

    @property
    def optimizer(self) -> Optimizer | None:
        """The bound optimizer, ``None`` before `bind`."""
        return self._stepper.optimizer() if self._stepper.optimizer is not None else None

    @property
    def pending(self) -> bool:
        """Whether a pass ran since the last optimizer step or ``zero_grad``: its gradients wait for a step."""
        return bool(self._stepper.ran)

    def bind(self, optimizer: Any) -> None:
        """Run the gradient and update stages around this optimizer's step; for hosts that make it late.

        Raises:
            PlanError: no torch optimizer, one of another model, or a second one.
        """
        self._require_attached()
        self._stepper.bind(optimizer, self.slots)

    def backward(
        self, batch: Mapping[str, Any], num_items: NumItems | None = None, backward: Backward | None = None
    ) -> dict[str, Tensor]:
        """Run every pass of the method on a batch: forward, loss, backward.

        Gradients and slots accumulate until the bound optimizer steps or its ``zero_grad`` is called. Without one, and
        for ``model.zero_grad()``, a new step begins when a main gradient that was there is ``None`` again: gradients
        that are set to zero in place, or slots next to no main gradient, then go on accumulating.

        Args:
            batch: Model inputs, ``labels`` if the loss needs them, and the label columns (bool ``[batch]`` or
                ``[batch, token]``), which the model never sees.
            num_items: Loss tokens of the whole accumulation window, one number or (several losses) one by loss, as
                ``surgery.count_items`` gives; each loss then is a sum over this batch divided by it, so that
                micro-batches add up to one batch, and ranks to one rank.
            backward: Runs the backward of a scalar instead of ``Tensor.backward`` (Accelerate's, a scaler's); called
                with ``retain_graph=True`` for all but the last of several losses over one forward.

        Returns:
            Detached fp32 scalar by loss: ``{"C1": …, "C2": …}``; 0 where ``rows`` flags nobody.

        Raises:
            BatchError: labels missing or of wrong shape or dtype (before any pass runs); a loss that is not finite
                (before its backward).
            PlanError: the gradient stage of this step has run already; schedules, and no bound optimizer to count by.
        """
        self._require_attached()
        self._agree(batch)  # before anything that one rank alone may refuse
        check_backward(backward, num_items)
        self._stepper.abandon()
        if not self._stepper.bound and (scheduled := [p.name for p in self.method.passes if p.when is not None]):
            raise PlanError(
                f"when=… of {', '.join(map(repr, scheduled))} counts optimizer steps, and no optimizer is bound: "
                f"surgery.bind(optimizer)."
            )
        return self._backward(batch, num_items, backward)

    def _backward(
        self, batch: Mapping[str, Any], num_items: NumItems | None = None, backward: Backward | None = None
    ) -> dict[str, Tensor]:
        reshard(self.base)
        if self._had_main and not self._has_main():
            self._stepper.new_window(self.slots)  # model.zero_grad() without a step: a scaler skipped it
        if self._stepper.finished:
            raise PlanError(
                "the gradient stage of this step has run; step the optimizer, or zero_grad(), before backward."
            )
        if not self._stepper.ran:
            self._passes.losses = {}
        running = self._scheduled()
        self._require_c1()
        with failing_together(self.base, self.model, "reading the batch", always=self._first):
            shares = self._shares(running, batch)
        self._first = False
        out: dict[str, Tensor] = {}
        if self._buffers is not None:
            self._buffers.hold(self.model)
        try:
            for p in running:
                out.update(self._passes.run(p, shares[p.name], len(running), num_items, backward))
                self._stepper.ran.add(p.name)
        finally:
            self._had_main = self._has_main()
        if backward is not None and len(self.slots):
            self._stepper.probe = Probe.of(self.base)
        return out

    def _shares(self, passes: Sequence[Pass], batch: Mapping[str, Any]) -> dict[str, PassBatch]:
        """What each pass takes of a batch."""
        compiled = any(p.rows for p in passes) and is_compiled(self.model)
        return {p.name: batch_for(p, batch, self.base, self.method.columns, compiled) for p in passes}

    def _agree(self, batch: Mapping[str, Any]) -> None:
        """All ranks run this method, from this step on; those of one tensor-parallel model on the same rows."""
        if not self._agreed:
            reshard(self.base)
            require_agreement(self.method, self.base, self.model, self.step, batch)
            self._agreed = True

    def _require_c1(self) -> None:
        """A method that swaps weights itself starts in C1; any other runs in whatever configuration it finds."""
        if any(p.weight_transforms for p in self.method.passes):
            require_c1(self.base, "a method with keys")

    def _has_main(self) -> bool:
        return any(p.grad is not None for p in self.base.parameters())

    def count_items(self, batches: Sequence[Mapping[str, Any]], average: bool = True) -> dict[str, Tensor]:
        """Items that each loss of this step is a mean over, in an accumulation window: ``num_items`` of ``backward``.

        Args:
            batches: All micro-batches of the window, on this rank.
            average: Average over ranks (a collective call), since DDP and FSDP average gradients: the global number of
                items per rank, with which n ranks equal one.
        """
        return count_items(self._scheduled(), batches, self.base, self.method.columns, average)

    def _scheduled(self) -> list[Pass]:
        out = []
        for p in self.method.passes:
            peers = [q for q in self.method.passes if q.when == p.when]
            if p.when is None or p.when.runs(self.step, peers.index(p), len(peers)):
                out.append(p if self._enabled else dataclasses.replace(p, under=()))
        return out

    def refresh(self, slot: str, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Fill a slot anew: the mean gradient of the passes into it over some batches of their own.

        Nothing else changes: ``.grad``, other slots, schedules and metrics stay. The slot then serves as many optimizer
        steps as its passes ``keep`` it for, the next one first.

        Args:
            slot: A slot that passes fill; those under ``gs.on_refresh()`` run only here.
            batches: Whole data sets or parts of them; all ranks give equally many.

        Returns:
            The mean losses over this rank's items, detached fp32 scalars.

        Raises:
            SlotError: ``"main"``, a slot that no pass fills.
            BatchError: no batches, or batches that a pass cannot read.
        """
        self._require_attached()
        passes = [refreshing(p, slot) for p in self.method.passes if slot in p.slots]
        if slot == "main" or not passes:
            have = ", ".join(sorted(self.method.slots - {"main"})) or "none"
            raise SlotError(f"refresh fills slots of their own that a pass fills; {slot!r} is none of {have}.")
        if not self._enabled:
            passes = [dataclasses.replace(p, under=()) for p in passes]
        reshard(self.base)
        given = list(batches)
        if not given:
            raise BatchError(f"refresh of slot {slot!r} got no batches.")
        self._require_c1()
        num_items = count_items(passes, given, self.base, self.method.columns, average=True)
        if self._buffers is not None:
            self._buffers.hold(self.model)
        before, self._passes.losses = self._passes.losses, {}
        try:
            with self.slots.anew(slot):
                for batch in given:
                    for p in passes:
                        share = self._shares([p], batch)[p.name]
                        self._passes.run(p, share, len(passes), num_items, None)
            losses = self._passes.losses
        finally:
            self._passes.losses = before
        return {name: total / max(float(count), 1e-9) for name, (total, count) in losses.items()}

    def finish(self) -> None:
        """The gradient stage, now; the optimizer's step calls it otherwise. Once per step, however often called."""
        self._require_attached()
        reshard(self.base)
        self._had_main = self._has_main()
        self._stepper.finish(self.slots)

    @contextmanager
    def running(self, mode: str, batch: Mapping[str, Any] | None = None, name: str | None = None) -> Iterator[None]:
        """Switch the hooks on around a forward and backward that somebody else owns (TRL's trainers, your own loop).

        Args:
            mode: ``"train"`` runs under the transforms of a pass; ``"generate"`` and ``"reference"`` run plain.
            batch: Brings the label columns.
            name: The pass, where the method has several.

        Raises:
            PlanError: an unknown mode, several passes and no name, a pass with a stream, rows, refs, a weight, a slot,
                a schedule or a loss of its own, or other transforms at work on the same modules.
            BatchError: label columns missing or of wrong shape or dtype.
        """
        self._require_attached()
        if mode not in ("train", "generate", "reference"):
            raise PlanError(f'running takes "train", "generate" or "reference", not {mode!r}.')
        if mode != "train" or not self._enabled:
            with self._board.off():
                yield
            return
        chosen = [p for p in self.method.passes if name in (None, p.name)]
        if len(chosen) != 1:
            raise PlanError(f"running needs the name of one pass: {', '.join(p.name for p in self.method.passes)}.")
        require_plain(chosen[0], "a forward and backward of your own", "surgery.backward")
        columns = label_columns(chosen[0], batch or {})
        self._agree(batch or {})
        reshard(self.base)
        self._require_c1()
        with ExitStack() as stack:
            for transform in chosen[0].weight_transforms:
                stack.enter_context(transform.during(self.base, self.slots))
            stack.enter_context(self._board.on(self._plans[chosen[0].name], run_of(columns, 1, batch or {})))
            stack.enter_context(added_after([self.base.get_parameter(own) for own in self._passes.apart]))
            yield
        self._stepper.ran.add(chosen[0].name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block passes run without transforms, and steps without the gradient and update stage's work."""
        before = self._enabled
        self._enabled = self._stepper.enabled = False
        try:
            yield
        finally:
            self._enabled = self._stepper.enabled = before

    def track(self, **regions: Region) -> None:
        """Add the gradient norm of some regions to the metrics (``grad_norm/<name>``), measured before clipping."""
        self._stepper.tracked.update(regions)

    def metrics(self) -> dict[str, float]:
        """The last step's losses (means over its micro-batches) and gradient norms, as floats (one synchronisation)."""
        out = {f"loss/{name}": float(total / count) for name, (total, count) in self._passes.losses.items() if count}
        return {**out, **{name: float(value) for name, value in self._stepper.metrics.items()}}

    def loss_totals(self) -> dict[str, tuple[float, float]]:
        """Of every loss of the method, in order: its sum over the last step's items on this rank, and their number."""
        names = [name for p in self.method.passes for name in p.losses]
        totals = {name: self._passes.losses.get(name, (0.0, 0.0)) for name in names}
        return {name: (float(total), float(count)) for name, (total, count) in totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model and optimizer: plain data, tensors of stateful transforms, kept slots.

        Sharded tensors are gathered, so that all ranks must call this.
        """
        reshard(self.base)
        return state_of(self.method, self.base, self._stepper, self.slots)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a surgery of the same method on the same model stopped.

        Raises:
            ArtefactError: the state is of another model or method, or no surgery state.
        """
        reshard(self.base)
        take_state(state, self.method, self.base, self._stepper, self.slots)

    def remove(self) -> None:
        """Take every hook off the model and the optimizer; moments that were stepped in C2 return to C1."""
        self._board.remove()
        try:
            self._stepper.remove()
        finally:
            if self._buffers is not None:
                self._buffers.release()
            self._passes.losses = {}
            self.slots.clear()
            self.attached = False
            if attached_to(self.base) is self:
                del self.base.__dict__[HELD]

    def __enter__(self) -> Surgery:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _require_attached(self) -> None:
        if not self.attached:
            raise PlanError("this surgery was removed from its model; call gs.attach again.")


HELD = "_gradsurgery"


class Held:
    """A model's strong reference to the surgery on it, left behind by copies and pickles of the model."""

    def __init__(self, surgery: Surgery | None = None) -> None:
        self.surgery = surgery

    def __reduce__(self) -> tuple[type[Held], tuple[()]]:
        return Held, ()


def hold(surgery: Surgery) -> None:
    """Keep an attached surgery alive as long as its model: its hooks act, whether or not anybody holds the handle."""
    surgery.base.__dict__[HELD] = Held(surgery)


def attached_to(base: nn.Module) -> Surgery | None:
    held = base.__dict__.get(HELD)
    return held.surgery if isinstance(held, Held) else None
