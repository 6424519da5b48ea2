"""``gs.SurgeryTrainer``: a Hugging Face ``Trainer`` whose training step is ``surgery.backward``."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.surgery.attach import attach
from gradsurgery.surgery.batches import without_labels
from gradsurgery.surgery.checkpoint import load_state, save_state
from gradsurgery.surgery.method import Method
from gradsurgery.surgery.surgery import Surgery
from gradsurgery.transforms.clip import Clip, clip

log = logging.getLogger("gradsurgery")


class SurgeryTrainer(Trainer):
    """A stock ``Trainer`` that trains by a method.

    Losses are the passes' own; accumulation, mixed precision, DDP, FSDP2, ``torch.compile``, checkpoints and logging
    are the Trainer's. Label columns survive ``remove_unused_columns`` and never reach the model. ``max_grad_norm``
    becomes a ``gs.clip`` at the end of the method's gradient stage (unless it has one), so that it clips what is
    stepped with, and the logged ``grad_norm`` is the norm it saw. Checkpoints are stock ones with a ``surgery.json``.

    Args:
        *args: As for ``transformers.Trainer``.
        method: What to do; checked against the model here.
        **kwargs: As for ``transformers.Trainer``.

    Attributes:
        surgery: The running `Surgery`; ``None`` outside of ``train()``.

    Raises:
        PlanError: a host or an argument under which the method would be wrong: DeepSpeed, ``nn.DataParallel``,
            layerwise optimizers, label smoothing or a ``compute_loss_func`` (passes have their own losses).
        SelectionError: regions of another model.

    Example:
        >>> trainer = gs.SurgeryTrainer(model, args, train_dataset=rows, method=method)  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
    """

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        if not isinstance(method, Method):
            raise PlanError(f"SurgeryTrainer takes method=gs.Method(…), not {type(method).__name__}.")
        self.method, self.surgery = method, None
        self._resumed: str | bool | None = None
        self._last_state: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        self._check_host()
        self.args: Any = copy.copy(self.args)  # the caller's arguments stay as they are
        norm = self.args.max_grad_norm
        self.args.max_grad_norm = 0.0
        if norm and norm > 0 and not any(isinstance(t, Clip) for t in method.gradient):
            self.method = dataclasses.replace(method, gradient=(*method.gradient, clip(norm)))
        self.method.validate(self.model)
        self.add_callback(_Life(self))

    surgery: Surgery | None
    _signature_columns: list[str] | None

    def _check_host(self) -> None:
        args, parallel = self.args, getattr(self.accelerator, "parallelism_config", None)
        wrong = {
            "DeepSpeed steps its optimizer inside backward; use FSDP2 or DDP": self.is_deepspeed_enabled,
            "nn.DataParallel runs replicas in threads; start one process per GPU with torchrun": args.n_gpu > 1,
            f"optim={args.optim} steps inside backward; choose one that steps once": any(
                name in str(args.optim).lower() for name in ("lomo", "layerwise")
            ),
            "label_smoothing_factor has no effect on the losses of passes; smooth in gs.Pass(loss=…)": bool(
                args.label_smoothing_factor
            ),
            "compute_loss_func is not called; give the loss to gs.Pass(loss=…)": self.compute_loss_func is not None,
            "context and sequence parallelism cut the batch after the labels are read": bool(
                parallel is not None and (parallel.cp_enabled or parallel.sp_enabled)
            ),
        }
        if found := [reason for reason, is_so in wrong.items() if is_so]:
            raise PlanError(f"SurgeryTrainer cannot run like this: {'; '.join(found)}.")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; the surgery is off the model again when it returns or raises."""
        self._resumed = resume_from_checkpoint
        try:
            out = super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            self._end(failed=True)
            raise
        self._end()
        return out

    def _begin(self) -> None:
        """Attach: the model is wrapped and not called yet, the optimizer exists, ``global_step`` is restored."""
        self._end()
        self.surgery = attach(self.method, self.model_wrapped, self.optimizer)
        if self._resumed:
            where = get_last_checkpoint(self.args.output_dir) if self._resumed is True else self._resumed
            resume(self.surgery, Path(str(where)), self.state.global_step)

    def _end(self, failed: bool = False) -> None:
        if self.surgery is not None:
            if not failed:  # gathering what is sharded would wait for ranks that did not fail
                self._last_state = self.surgery.state_dict()
            self.surgery.remove()
            self.surgery = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The window's micro-batches, and by loss the items that it is a mean over (per rank, averaged over ranks)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.surgery is None or not batches:
            return batches, None
        return batches, self.surgery.count_items(batches, average=self.args.average_tokens_across_devices)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of every pass; returns this micro-batch's share of the window's weighted loss."""
        assert self.surgery is not None
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers
        shares: list[Tensor] = []

        def backward(loss: Tensor, **more: Any) -> None:
            shares.append(loss.detach())
            self.accelerator.backward(loss, **more)

        self.surgery.model = model
        with self.compute_loss_context_manager():
            self.surgery.backward(self._prepare_inputs(inputs), num_items_in_batch, backward)
        return (
            torch.stack([share.float() for share in shares]).sum()
            if shares
            else torch.zeros((), device=self.args.device)
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, without_labels(inputs, self.method.columns), *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, without_labels(inputs, self.method.columns), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.surgery is not None and "loss" in logs:
            metrics = self.surgery.metrics()
            if self.args.world_size > 1:  # every rank sends every loss, also one that its rows had no part in
                totals = self.surgery.loss_totals()
                sums = self.accelerator.reduce(torch.tensor(list(totals.values()), device=self.args.device), "sum")
                means = {
                    f"loss/{name}": total / count
                    for name, (total, count) in zip(totals, sums.tolist(), strict=True)
                    if count
                }
                metrics.update(means)
            logs.update(metrics)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.save_model``, with ``surgery.json`` beside the weights."""
        super().save_model(output_dir, *args, **kwargs)
        state = self.surgery.state_dict() if self.surgery is not None else self._last_state
        if state is not None and self.args.should_save:
            save_state(state, str(output_dir or self.args.output_dir))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            streams = [p.stream for p in self.method.passes if p.stream]
            known: list[str] = self._signature_columns or []
            self._signature_columns = [*known, *sorted({*self.method.columns, *streams} - set(known))]


class _Life(TrainerCallback):
    """Attaches once the Trainer has wrapped the model, made the optimizer and loaded its own checkpoint."""

    def __init__(self, trainer: SurgeryTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin()


def resume(surgery: Surgery, checkpoint: Path, step: int) -> None:
    """Continue a surgery from the state beside a checkpoint; without one (a stock checkpoint), from its step alone."""
    try:
        state = load_state(checkpoint)
    except ArtefactError as error:
        if (checkpoint / "surgery.json").exists():
            raise
        log.warning("%s; the schedules of the method continue at step %d.", error, step)
        state = {**surgery.state_dict(), "step": step}
    surgery.load_state_dict(state)
