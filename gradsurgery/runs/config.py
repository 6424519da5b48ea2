"""How a model is trained: what every recipe takes under ``train``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TrainConfig:
    """How a model is trained.

    Args:
        steps: Optimizer steps.
        learning_rate: Peak learning rate of the cosine schedule.
        min_learning_rate: Where the schedule ends.
        warmup: Share of the steps that warm up linearly.
        weight_decay: AdamW's decoupled decay, on matrices.
        beta2: AdamW's second momentum.
        accumulation: Micro-batches of a step.
        max_grad_norm: Global norm clip; 0 for none, as in SGTM's originals.
        bf16: Autocast to bf16.
        checkpointing: Gradient checkpointing: activations are computed again in the backward.
        compile: ``torch.compile`` the model.
        eval_every: Steps between evaluations on a small held-back sample; 0 for none.
        eval_rows: Sequences of each category in that sample.
        save_every: Steps between checkpoints to resume from; 0 for none.
        log_every: Steps between metric lines.
        peak_tflops: The device's peak, for the model-FLOPs utilisation; known for some accelerators in bf16.
        report_to: Trackers of the Trainer ("wandb", "tensorboard", …).
    """

    steps: int = 1200
    learning_rate: float = 3e-3
    min_learning_rate: float = 0.0
    warmup: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    accumulation: int = 1
    max_grad_norm: float = 0.0
    bf16: bool = False
    checkpointing: bool = False
    compile: bool = False
    eval_every: int = 200
    eval_rows: int = 32
    save_every: int = 300
    log_every: int = 25
    peak_tflops: float | None = None
    report_to: str = "none"

    def schedule(self) -> dict[str, Any]:
        """The learning rate's course, as arguments of the Trainer."""
        if not self.min_learning_rate:
            return {"lr_scheduler_type": "cosine"}
        least = {"min_lr": self.min_learning_rate}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": least}
