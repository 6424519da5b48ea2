"""Train one model of an experiment under a method: progress bar, metrics, checkpoints, resume."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainingArguments

from gradsurgery.errors import ArtefactError, KeyStateError
from gradsurgery.evaluation.flops import model_flops
from gradsurgery.files import read_json
from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.metrics import Metrics, Scorer, peak_flops
from gradsurgery.runs.steps import Steps, rows_a_rank, tokens_a_step
from gradsurgery.surgery import Method
from gradsurgery.surgery.trainer import SurgeryTrainer


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end: the Trainer writes ``trainer_state.json`` last."""
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in numbered:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]:
                return path
        shutil.rmtree(path, ignore_errors=True)  # cut off by a kill
    return None


def adopt(checkpoint: Path, checkpoints: Path) -> Path:
    """Another recipe's checkpoint as the first of this run: weights, moments, schedule and step, without its method.

    Raises:
        ArtefactError: no checkpoint to resume from.
        KeyStateError: its moments are in C2.
    """
    state = read_json(checkpoint / "trainer_state.json", "a checkpoint of a training")
    moments: set[str] = set()
    if (checkpoint / "surgery.json").is_file():
        kept = read_json(checkpoint / "surgery.json", "the state of a surgery").get("transforms", {})
        moments = {values["moments"] for values in kept.values() if values.get("moments", "C1") != "C1"}
    if moments:
        raise KeyStateError(
            f"{checkpoint} was stepped in C2 (key {', '.join(moments)}), and its optimizer's moments lie there: only "
            f"the recipe with step_in=C2 and that key can resume it. Its weights are C1: start_from={checkpoint}."
        )
    if not (checkpoint / "optimizer.pt").is_file():
        raise ArtefactError(f"{checkpoint} holds no optimizer.pt to resume from; start_from takes its weights alone.")
    out = checkpoints / f"checkpoint-{state['global_step']}"
    left_out = shutil.ignore_patterns("surgery.*")
    beside = checkpoints / ".adopted"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(checkpoint, beside, ignore=left_out)
    os.replace(beside, out)
    return out


class _InOrder(SurgeryTrainer):
    """Rows in their order: ``train_sampling_strategy="sequential"``, which transformers before 5.2 does not know."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def train(
    name: str,
    model: PreTrainedModel,
    method: Method,
    data: Steps,
    folder: RunFolder,
    config: TrainConfig,
    seed: int = 0,
    score: Scorer | None = None,
    resume_from: str | Path | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, float]:
    """Train ``model`` under ``method``, resuming from the last whole checkpoint of the same run.

    Args:
        name: Name of the model in the run.
        model: Trained in place.
        method: What each step does.
        data: The rows of each step.
        folder: The run's folder.
        config: How to train.
        seed: Of the Trainer's random state.
        score: Held-back scores for the curves.
        resume_from: A checkpoint of another recipe to go on from, where this run has none of its own.
        optimizer: Of the model's parameters; by default AdamW as ``config`` says.

    Returns:
        ``{"seconds", "tokens_per_second", "flops"}`` and, where the devices' peak is known, ``"mfu"``: of this start,
        FLOPs of the whole training. Checkpoints stay until ``folder.store(name, …)``, so that nothing is lost.
    """
    checkpoints = folder / "checkpoints" / name
    trained, forwarded = tokens_a_step(method, data)
    flops = model_flops(model, round(trained), data.context) + model_flops(model, round(forwarded), data.context) / 3
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=rows_a_rank(data.size, config.accumulation),
        gradient_accumulation_steps=config.accumulation,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        **config.schedule(),
        warmup_steps=max(int(config.steps * config.warmup), 1) if config.warmup else 0,
        weight_decay=config.weight_decay,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=config.bf16,
        torch_compile=config.compile,
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
    peak = peak_flops(config.peak_tflops, config.bf16)
    metrics = Metrics(folder, name, flops, trained, score, peak)
    if config.checkpointing:  # the Trainer's argument for it has another name in newer releases
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = _InOrder(
        model=model,
        args=arguments,
        method=method,
        train_dataset=data,
        data_collator=data.collate,
        callbacks=[metrics],
        optimizers=(optimizer, None),
    )
    if config.report_to != "none":
        metrics.send = trainer.log
    with arguments.main_process_first():
        last = last_whole_checkpoint(checkpoints)
        if last is None and resume_from is not None:
            last = adopt(Path(resume_from), checkpoints)
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    seconds = float(result.metrics["train_runtime"])
    return {"seconds": seconds, **metrics.speed(), "flops": flops * config.steps}
