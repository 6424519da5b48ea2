"""The handle that runs a method: backward passes under their transforms, then the stages around the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.surgery.batches import PassBatch, batch_for, label_columns
from gradsurgery.surgery.checkpoint import state_of, take_state
from gradsurgery.surgery.hosts import check_host, reduce_again, several_backwards, sync_every_backward
from gradsurgery.surgery.items import NumItems, count_items, items_of, per_item
from gradsurgery.surgery.method import Method
from gradsurgery.surgery.passes import Pass
from gradsurgery.surgery.slots import Slots
from gradsurgery.surgery.stepping import Stepper
from gradsurgery.transforms.engine.hooks import Switchboard
from gradsurgery.transforms.engine.run import Run

Backward = Callable[..., Any]


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
        self._model = model
        self.slots = Slots()
        self._losses: dict[str, tuple[Tensor, Any]] = {}
        self._enabled = True
        self.attached = True

    @property
    def model(self) -> nn.Module:
        return self._model

    @model.setter
    def model(self, host: nn.Module) -> None:
        if unwrap(host) is not self.base:
            raise PlanError(f"surgery.model takes the attached {type(self.base).__name__} or a wrapper around it.")
        check_host(host, self.method.slots)
        self._model = host

    @property
    def step(self) -> int:
        return self._stepper.step

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
            PlanError: the gradient stage of this step has run already.
        """
        self._require_attached()
        started = self.slots or self._stepper.ran or self._stepper.finished
        if started and all(p.grad is None for p in self.base.parameters()):
            self._stepper.new_window(self.slots)  # zero_grad without a step: a scaler skipped it
        if self._stepper.finished:
            raise PlanError(
                "the gradient stage of this step has run; step the optimizer, or zero_grad(), before backward."
            )
        if not self._stepper.ran:
            self._losses = {}
        running = self._scheduled()
        shares = {p.name: batch_for(p, batch, self.base, self.method.columns) for p in running}
        out: dict[str, Tensor] = {}
        for p in running:
            out.update(self._run_pass(p, shares[p.name], len(running), num_items, backward))
        return out

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
            peers = [q for q in self.method.passes if q.when is p.when]
            if p.when is None or p.when.runs(self.step, peers.index(p), len(peers)):
                out.append(p if self._enabled else dataclasses.replace(p, under=()))
        return out

    def _run_pass(
        self, p: Pass, share: PassBatch, passes: int, num_items: NumItems | None, backward: Backward | None
    ) -> dict[str, Tensor]:
        refs = self._references(p, share)
        parameters = dict(self.base.named_parameters())
        out: dict[str, Tensor] = {}
        with self._switched(p, Run(share.columns, passes)):
            if self.method.slots != {"main"}:
                sync_every_backward(self.base)
            with several_backwards(self.model) if len(p.losses) > 1 else nullcontext():
                outputs = self.model(**share.inputs)
            self._board.check_called(self.model)
            losses = {name: loss(outputs, share.batch, refs) for name, loss in p.losses.items()}
            for name, loss in losses.items():
                require_finite(name, loss)
            for k, (name, loss) in enumerate(losses.items()):
                factor: Any = p.weight * share.share
                items: Any = 1.0
                if num_items is not None:
                    items = items_of(p.losses[name], share, self.base).to(loss.device)
                    factor = p.weight * per_item(items, num_items, name)
                scaled = loss if isinstance(factor, float) and factor == 1.0 else loss * factor
                more = {"retain_graph": True} if k + 1 < len(losses) else {}
                with self.slots.installed(p.slot(name), parameters):
                    (backward or Tensor.backward)(scaled, **more)
                    if k:
                        reduce_again(self.model, parameters.values())
                out[name] = loss.detach().float() * share.share
                self._record(name, out[name], items)
        self._stepper.ran.add(p.name)
        return out

    def _record(self, name: str, loss: Tensor, items: Any) -> None:
        """Mean over the window's items, for the metrics."""
        total, count = self._losses.get(name, (torch.zeros_like(loss), 0.0))
        self._losses[name] = (total + loss * items, count + items)

    def _references(self, p: Pass, share: PassBatch) -> dict[str, Any]:
        if not p.refs:
            return {}
        training = self.base.training
        self.base.eval()
        try:
            with torch.no_grad():
                return {name: reference(self.model, share.inputs) for name, reference in p.refs.items()}
        finally:
            self.base.train(training)

    @contextmanager
    def _switched(self, p: Pass, run: Run) -> Iterator[None]:
        if not self._enabled:
            yield
            return
        with self._board.on(self._plans[p.name], run):
            yield

    def finish(self) -> None:
        """The gradient stage, now; the optimizer's step calls it otherwise. Once per step, however often called."""
        self._require_attached()
        self._stepper.finish(self.slots)

    @contextmanager
    def running(self, mode: str, batch: Mapping[str, Any] | None = None, name: str | None = None) -> Iterator[None]:
        """Switch the hooks on around a forward and backward that somebody else owns (TRL's trainers, your own loop).

        Args:
            mode: ``"train"`` runs under the transforms of a pass; ``"generate"`` and ``"reference"`` run plain.
            batch: Brings the label columns.
            name: The pass, where the method has several.

        Raises:
            PlanError: an unknown mode, several passes and no name, or other transforms at work on the same modules.
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
        columns = label_columns(chosen[0], batch or {})
        with self._board.on(self._plans[chosen[0].name], Run(columns, 1)):
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
        out = {f"loss/{name}": float(total / count) for name, (total, count) in self._losses.items() if count}
        return {**out, **{name: float(value) for name, value in self._stepper.metrics.items()}}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model and optimizer: plain data, and tensors of stateful transforms."""
        return state_of(self.method, self.base, self._stepper)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a surgery of the same method on the same model stopped.

        Raises:
            ArtefactError: the state is of another model or method, or no surgery state.
        """
        take_state(state, self.method, self.base, self._stepper)

    def remove(self) -> None:
        """Take every hook off the model and the optimizer."""
        self._board.remove()
        self._stepper.remove()
        self._losses = {}
        self.slots.clear()
        self.attached = False

    def __enter__(self) -> Surgery:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _require_attached(self) -> None:
        if not self.attached:
            raise PlanError("this surgery was removed from its model; call gs.attach again.")


def require_finite(name: str, loss: Tensor) -> None:
    """Refuse a loss that is nan or inf before its backward spoils the gradient (on the CPU: it would synchronise)."""
    if loss.device.type == "cpu" and not torch.isfinite(loss).all():
        raise BatchError(
            f"the loss of {name!r} is {loss.item()}: the batch holds nan or inf, or training has diverged."
        )
