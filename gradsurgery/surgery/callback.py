"""``gs.SurgeryCallback``: a method of one pass inside a stock ``Trainer``, which owns forward, loss and backward."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from gradsurgery.errors import PlanError
from gradsurgery.surgery.attach import attach
from gradsurgery.surgery.batches import label_columns
from gradsurgery.surgery.checkpoint import save_state
from gradsurgery.surgery.method import Method
from gradsurgery.surgery.passes import require_plain
from gradsurgery.surgery.surgery import Surgery

log = logging.getLogger("gradsurgery")


class SurgeryCallback(TrainerCallback):
    """Run the transforms of a method's single pass around a stock ``Trainer``'s own forward and backward.

    The model's own loss is trained, as the Trainer computes it. Label columns are taken out of the model's arguments by
    a hook, so ``remove_unused_columns`` must be ``False``. After an exception inside ``train()``, of which a stock
    Trainer tells nobody, ``callback.remove()`` takes the hooks off; `SurgeryTrainer` does that by itself.

    Args:
        method: One pass with forward transforms, a gradient and an update stage.

    Attributes:
        surgery: The running `Surgery`; ``None`` outside of ``train()``.

    Raises:
        PlanError: what a stock Trainer would ignore or do in the wrong order: several passes; a pass with a stream,
            rows, refs, a schedule, a slot, a weight or a loss of its own; and at train begin ``remove_unused_columns``,
            ``max_grad_norm > 0`` together with a gradient stage, ``torch_compile``, DeepSpeed.

    Example:
        >>> callback = gs.SurgeryCallback(method)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(self, method: Method) -> None:
        if not isinstance(method, Method):
            raise PlanError(f"SurgeryCallback takes a gs.Method, not {type(method).__name__}.")
        check_method(method)
        self.method = method
        self.surgery: Surgery | None = None
        self._pass = contextlib.ExitStack()
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        check_arguments(self.method, args)
        self.remove()
        self.surgery = attach(self.method, model, optimizer)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after_forward),
        ]
        if state.global_step:
            from gradsurgery.surgery.trainer import resume

            given = args.resume_from_checkpoint
            beside = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            resume(self.surgery, Path(given) if isinstance(given, str) else beside, state.global_step)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.surgery is not None
        plain = {name: value for name, value in kwargs.items() if name not in self.method.columns}
        if model.training and torch.is_grad_enabled():
            self._pass.close()
            label_columns(self.method.passes[0], kwargs)
            self._pass.enter_context(self.surgery.running("train", kwargs))
        return args, plain

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.surgery is not None and model.training and torch.is_grad_enabled():
            self.surgery._board.check_called(self.surgery.model)

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._pass.close()  # the micro-batch's backward is over

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._pass.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.surgery is None or logs is None or "loss" not in logs:
            return
        metrics = self.surgery.metrics()
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.surgery is None:
            return
        held = self.surgery.state_dict()  # on all ranks: it gathers what is sharded
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and directory.is_dir():
            save_state(held, directory)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off model and optimizer; for use after an exception in ``train()``."""
        self._pass.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.surgery is not None:
            self.surgery.remove()
            self.surgery = None


def check_method(method: Method) -> None:
    """Raise unless a stock Trainer's own forward, loss and backward are what the method's pass means."""
    if len(method.passes) != 1:
        raise PlanError(
            f"SurgeryCallback runs inside the one forward of a stock Trainer, and this method has {len(method.passes)} "
            f"passes; use gs.SurgeryTrainer."
        )
    (p,) = method.passes
    require_plain(p, "a stock Trainer", "gs.SurgeryTrainer")


def check_arguments(method: Method, args: Any) -> None:
    """Raise where a stock Trainer's arguments would make the method silently wrong."""
    if args.remove_unused_columns and method.columns:
        raise PlanError(
            f"the Trainer would drop the label columns {', '.join(sorted(method.columns))}: set "
            f"remove_unused_columns=False, or use gs.SurgeryTrainer."
        )
    if args.max_grad_norm and args.max_grad_norm > 0 and method.gradient:
        raise PlanError(
            f"a stock Trainer clips to max_grad_norm={args.max_grad_norm} before the gradient stage runs; set it to "
            f"0 and put gs.clip({args.max_grad_norm}) last in gradient=[…], or use gs.SurgeryTrainer."
        )
    if args.torch_compile:
        raise PlanError("SurgeryCallback cannot take label columns out of a compiled forward; use gs.SurgeryTrainer.")
    if getattr(args, "deepspeed", None):
        raise PlanError("DeepSpeed steps its optimizer inside backward; use FSDP2 or DDP.")
    if args.max_grad_norm and args.max_grad_norm > 0 and method.update:
        log.warning("the Trainer's max_grad_norm also counts frozen entries; gs.clip in the method does not.")
