"""One policy after the other: trained by TRL under its variant's method, measured with and without the quarantine."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.runs import pretrain
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.quarantine_controls import direction_for
from gradsurgery.runs.quarantine_grpo import VARIANTS, GrpoConfig, build_method
from gradsurgery.runs.quarantine_grpo_examiner import Examiner, Teacher
from gradsurgery.runs.quarantine_grpo_measure import cosines_of, log_probabilities, measure, probed
from gradsurgery.runs.quarantine_grpo_rows import PolicyRows, sums_tokenizer


def load_tokenizer(config: GrpoConfig) -> Any:
    """That of the given model, or one for sums.

    Raises:
        ArtefactError: there is none.
        PlanError: chats, and no template.
    """
    if config.model is None:
        tokenizer = sums_tokenizer(config.task.marks)
    else:
        with reading(config.model):
            tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if config.chat and not getattr(tokenizer, "chat_template", None):
        raise PlanError("chat=true puts questions by the tokenizer's template, and this one has none.")
    return tokenizer


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors of loading as a sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(
            f"{name} cannot be loaded ({reason}); give the folder of a stock checkpoint, or a name on the hub that "
            f"can be reached."
        ) from error


def make_start(config: GrpoConfig, folder: RunFolder, rows: PolicyRows) -> str | Path:
    """The policy that every variant starts from: as given, or trained first; its figures are stored as "start"."""
    where = Path(folder / "models/start") if config.model is None else config.model
    if "start" in folder.results():
        return where
    started = time.perf_counter()
    if config.model is None:
        model = train_pupil(config, folder, rows)
        pretrain.save(model, rows.tokenizer, folder, "start")
    seconds = time.perf_counter() - started
    model = load_model(where, config)
    folder.store("start", {"seconds": seconds, "on": measure(model, rows), **probed(model, rows)})
    return where


def train_pupil(config: GrpoConfig, folder: RunFolder, rows: PolicyRows) -> Any:
    """A small Llama that answers like a mediocre pupil: often wrong, sometimes with a claim."""
    start = config.start
    set_seed(config.seed)
    tokenizer = rows.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **start.options))
    answered = list(rows.task.demonstrations(start.rows * start.steps, start.right, start.hacks, "start"))
    print(f"\nstart: {model.num_parameters():,} parameters, {len(answered):,} answers", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=start.learning_rate, weight_decay=0.01)
    rates = OneCycleLR(optimizer, start.learning_rate, total_steps=start.steps)
    for step in range(start.steps):
        batch = rows.encode(answered[step * start.rows : (step + 1) * start.rows], whole=True)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step + 1 == start.steps:
            folder.log(model="start", step=step + 1, loss=float(loss.detach()))
    return model


def load_model(where: str | Path, config: GrpoConfig) -> Any:
    with reading(str(where)):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, config.dtype))
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model


class Lines(TrainerCallback):
    """The Trainer's logs as lines of the run's metrics."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        self.folder, self.name = folder, name

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            kept = {k: v for k, v in logs.items() if isinstance(v, int | float)}
            self.folder.log(model=self.name, step=state.global_step, **kept)


def arguments(config: GrpoConfig, folder: RunFolder, name: str) -> Any:
    """What TRL is told."""
    from trl import GRPOConfig

    policy = config.policy
    return GRPOConfig(
        output_dir=str(folder / "checkpoints" / name),
        per_device_train_batch_size=policy.prompts * policy.generations // policy.accumulation,
        gradient_accumulation_steps=policy.accumulation,
        num_generations=policy.generations,
        num_iterations=policy.iterations,
        max_steps=policy.steps,
        learning_rate=policy.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=policy.weight_decay,
        max_grad_norm=policy.max_grad_norm,
        max_completion_length=policy.max_new_tokens,
        temperature=policy.temperature,
        beta=policy.beta,
        loss_type=policy.loss,
        bf16=policy.bf16,
        gradient_checkpointing=policy.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if policy.checkpointing else None,
        logging_steps=policy.log_every,
        save_strategy="no",
        optim="adamw_torch",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
        report_to="none",
        seed=config.seed,
    )


def run_variant(name: str, where: str | Path, config: GrpoConfig, folder: RunFolder, rows: PolicyRows) -> None:
    """Train, measure, throw the quarantine away, measure again, probe, save; skipped where the run has it."""
    if name in folder.results():
        return
    from gradsurgery.integrations.trl_grpo import SurgeryGRPOTrainer

    folder.rewind(lambda line: line.get("model") != name)
    variant, model = VARIANTS[name], load_model(where, config)
    adapter = gs.adapters.add(model, **asdict(config.adapter), seed=config.seed)
    pairs, placebo = rows.pairs(config.score.pairs)
    compass = direction_for(VARIANTS["score"], model, adapter, pairs, placebo, seed=config.seed)
    direction = direction_for(variant, model, adapter, pairs, placebo, seed=config.seed)
    method = build_method(name, config, adapter, direction)
    examiner = Examiner(rows.task, config.detector, config.seed, filtered=name == "filter")
    sources: dict[str, Any] = {"flag": examiner.flag, "shuffled_flag": examiner.shuffled_flag, "clean": examiner.clean}
    if name == "no_flags":
        sources["flag"] = examiner.nobody
    print(f"\n{name}: {variant.about}\n{method.explain(adapter.host)}", flush=True)
    teacher = Teacher(rows, config.policy.teacher) if config.policy.teacher else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")  # known: TRL may change it
        trainer = SurgeryGRPOTrainer(
            adapter.host,
            examiner.reward,
            arguments(config, folder, name),
            train_dataset=rows.data_set(),
            processing_class=rows.tokenizer,
            rollout_func=teacher,
            callbacks=[Lines(folder, name)],
            method=method,
            flags={
                column: sources[column] for column in ("flag", "shuffled_flag", "clean") if column in method.columns
            },
        )
    log = logging.getLogger("trl.trainer.grpo_trainer")
    level = log.level
    log.setLevel(logging.ERROR if name == "filter" else level)  # which warns of every rollout without a reward
    started = time.perf_counter()
    try:
        trainer.train()
    finally:
        log.setLevel(level)
    figures: dict[str, Any] = {"seconds": time.perf_counter() - started, "method": method.describe()}
    figures |= {"adapter": adapter.describe(), "during": during(name, folder)}
    figures |= {"on": measure(model, rows), "log p on": log_probabilities(model, rows)}
    figures["cosines"] = cosines_of(adapter, compass, rows)
    adapter.save(folder / "models" / f"{name}-adapter.safetensors")
    adapter.ablate_()
    figures |= {"off": measure(model, rows), "log p off": log_probabilities(model, rows)}
    adapter.fold_()
    adapter.remove()
    pretrain.save(model, rows.tokenizer, folder, name)
    folder.store(name, {**figures, **probed(model, rows)})


def during(name: str, folder: RunFolder) -> dict[str, float]:
    """Means over the second half of the training's metric lines."""
    lines = [line for line in folder.metrics if line.get("model") == name]
    found: dict[str, list[float]] = {}
    for line in lines[len(lines) // 2 :]:
        for key, value in line.items():
            if key.startswith(("student/", "teacher/", "flagged/", "quarantine/", "entropy", "kl")):
                found.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}
