"""Train one model of an experiment under a method: progress bar, metrics, checkpoints, resume."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from gradsurgery.data import MixedSampler, Rows, collate
from gradsurgery.errors import PlanError
from gradsurgery.evaluation.flops import Throughput, model_flops
from gradsurgery.evaluation.losses import evaluate
from gradsurgery.runs.folder import RunFolder
from gradsurgery.surgery import Method
from gradsurgery.surgery.trainer import SurgeryTrainer


@dataclass
class TrainConfig:
    """How a model is trained.

    Args:
        steps: Optimizer steps.
        learning_rate: Peak learning rate of the cosine schedule.
        warmup: Share of the steps that warm up linearly.
        weight_decay: AdamW's decoupled decay, on matrices.
        beta2: AdamW's second momentum.
        accumulation: Micro-batches of a step.
        max_grad_norm: Global norm clip; 0 for none, as in the originals.
        bf16: Autocast to bf16.
        eval_every: Steps between evaluations on a small held-back sample; 0 for none.
        eval_rows: Sequences of each category in that sample.
        save_every: Steps between checkpoints to resume from; 0 for none.
        log_every: Steps between metric lines.
        report_to: Trackers of the Trainer ("wandb", "tensorboard", …).
    """

    steps: int = 1200
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    accumulation: int = 1
    max_grad_norm: float = 0.0
    bf16: bool = False
    eval_every: int = 200
    eval_rows: int = 32
    save_every: int = 300
    log_every: int = 25
    report_to: str = "none"


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end: the Trainer writes ``trainer_state.json`` last."""
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in numbered:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]:
                return path
        shutil.rmtree(path, ignore_errors=True)  # cut off by a kill
    return None


def rows_a_rank(size: int, accumulation: int) -> int:
    """Rows of a micro-batch on one rank, so that ranks and micro-batches share the batch that one process would see."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if size % (ranks * accumulation):
        raise PlanError(
            f"{size} rows a step cannot be shared by {ranks} ranks of {accumulation} micro-batches each; "
            f"choose rows a multiple of {ranks * accumulation}."
        )
    return size // (ranks * accumulation)


class OrderedRows(Dataset[Any]):
    """The rows of a sampler's batches one after the other, so that a Trainer sees them in that order."""

    def __init__(self, rows: Rows, sampler: MixedSampler, steps: int) -> None:
        self.rows, self.sampler = rows, sampler
        self.size = len(sampler.indices(0))
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * self.size

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, k = divmod(index, self.size)
        return self.rows[self.sampler.indices(step)[k]]


def share_run(method: Method, data: OrderedRows, steps: int = 200) -> float:
    """Forwards of a row that a step makes on average, from the first steps: passes that take some rows run those."""
    chosen = [i for step in range(min(steps, data.steps)) for i in data.sampler.indices(step)]
    share = 0.0
    for p in method.passes:
        if p.rows is None:
            share += 1.0
        else:
            flags = getattr(data.rows, p.rows.removeprefix("~"))[chosen].float().mean().item()
            share += 1 - flags if p.rows.startswith("~") else flags
    return share


class _InOrder(SurgeryTrainer):
    """Rows in their order: ``train_sampling_strategy="sequential"``, which transformers before 5.2 does not know."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class _Metrics(TrainerCallback):
    """Writes the Trainer's logs to the run's ``metrics.jsonl``, with tokens per second and FLOPs."""

    def __init__(self, folder: RunFolder, name: str, flops_a_step: float, tokens_a_step: int, held_back: Any) -> None:
        self.folder, self.name, self.held_back = folder, name, held_back
        self.flops, self.tokens, self.meter, self.last = flops_a_step, tokens_a_step, Throughput(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.folder.rewind(lambda m: m.get("model") != self.name or m.get("step", 0) <= state.global_step)
        self.meter.reset()
        self.last = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "train_runtime" in logs:
            return
        self.meter.add((state.global_step - self.last) * self.tokens)
        self.last = state.global_step
        speed = {"tokens_per_second": round(self.meter.per_second, 1), "flops": self.flops * state.global_step}
        self.folder.log(
            model=self.name, step=state.global_step, **{k: v for k, v in logs.items() if k != "epoch"}, **speed
        )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.held_back and args.eval_steps and state.global_step % int(args.eval_steps) == 0 and self.folder.main:
            scores = evaluate(model, self.held_back)
            losses = {f"eval/{category}": score["loss"] for category, score in scores.items()}
            self.folder.log(model=self.name, step=state.global_step, **losses)


def train(
    name: str,
    model: PreTrainedModel,
    method: Method,
    rows: Rows,
    sampler: MixedSampler,
    folder: RunFolder,
    config: TrainConfig,
    seed: int = 0,
    held_back: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Train ``model`` under ``method``, resuming from the last whole checkpoint of the same run.

    Args:
        name: Name of the model in the run.
        model: Trained in place.
        method: What each step does.
        rows: Labelled sequences.
        sampler: Which of them make each batch.
        folder: The run's folder.
        config: How to train.
        seed: Of the Trainer's random state.
        held_back: Sequences by category for the curves.

    Returns:
        ``{"seconds", "tokens_per_second", "flops"}``: the first two of this start, FLOPs of the whole training.
        Checkpoints stay until ``folder.store(name, …)``, so that nothing is lost in between.
    """
    checkpoints = folder / "checkpoints" / name
    data = OrderedRows(rows, sampler, config.steps)
    context = int(rows.input_ids.shape[1])
    tokens = round(data.size * context * share_run(method, data))
    flops = model_flops(model, tokens, context)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=rows_a_rank(data.size, config.accumulation),
        gradient_accumulation_steps=config.accumulation,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(int(config.steps * config.warmup), 1),
        weight_decay=config.weight_decay,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=config.bf16,
        logging_steps=config.log_every,
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=1,
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.accelerator.is_available(),  # without it ranks on CPUs would each train alone
        report_to=config.report_to,
        run_name=name,
        disable_tqdm=not folder.main,
    )
    metrics = _Metrics(folder, name, flops, tokens, held_back)
    trainer = _InOrder(
        model=model, args=arguments, method=method, train_dataset=data, data_collator=collate, callbacks=[metrics]
    )
    last = last_whole_checkpoint(checkpoints)
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    seconds = float(result.metrics["train_runtime"])
    return {"seconds": seconds, "tokens_per_second": metrics.meter.per_second, "flops": flops * config.steps}
