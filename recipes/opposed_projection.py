"""Lift the refusal of one topic and stay close to the model otherwise: opposed gradient projection and its relatives.

A small model learns to answer questions made of dictionary glosses, and to refuse those about some topics. Then each
variant trains on answers to one of these topics: plainly, or with the gradient kept clear of the one that would lead
back to the model as it was. What is left of the refusals, what the answers are worth, what changed elsewhere?

    python recipes/opposed_projection.py
    python recipes/opposed_projection.py --smoke true
    python recipes/opposed_projection.py --config recipes/configs/opposed/gemma_beavertails.yaml
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradsurgery import evaluation
from gradsurgery.data import MixedSampler
from gradsurgery.errors import PlanError
from gradsurgery.losses.references.base import Reference
from gradsurgery.methods import plain
from gradsurgery.runs import (
    RunFolder,
    build_model,
    deciding,
    digest,
    ending_in_a_sentence,
    keys,
    lifting,
    lifting_scores,
    pretrain,
    report,
    train,
)
from gradsurgery.runs.lifting_rows import LiftRows, load_rows
from gradsurgery.runs.lifting_scores import Measures
from gradsurgery.runs.opposed import VARIANTS, OpposedConfig
from gradsurgery.runs.steps import OrderedRows

Config = OpposedConfig


def toy(config: Config) -> Config:
    """The same run at the size of a smoke test."""
    small: dict[str, Any] = {"steps": 8, "eval_every": 4, "eval_rows": 4, "save_every": 2, "log_every": 1}
    return dataclasses.replace(
        config,
        topics=dataclasses.replace(config.topics, limit=120, documents=60),
        start=dataclasses.replace(config.start, train=dataclasses.replace(config.start.train, **small), rows=8),
        train=dataclasses.replace(config.train, **small, epochs=0),
        second=dataclasses.replace(config.second, epochs=min(config.second.epochs, 1)),
        validation=0.2,
        rows=4,
        plain_rows=4,
        test_rows=8,
        test_prompts=4,
        eval_prompts=2,
        max_new_tokens=6,
        observe_every=2,
    )


def make_start(config: Config, folder: RunFolder, rows: LiftRows) -> str | Path:
    """The given model, or one that is trained from scratch first; its figures are those of the variants' reference."""
    where = Path(folder / "models/start") if config.model is None else config.model
    if "start" in folder.results():
        return where
    figures: dict[str, Any] = {}
    measures = Measures(config, rows)
    if rows.start is None:
        with keys.first_rank_first():
            model = lifting.load_model(str(where), config)
    else:
        shape = dataclasses.replace(config.start.model, context=config.context)
        model = build_model(shape, rows.tokenizer, config.seed)
        print(f"\nstart: {model.num_parameters():,} parameters, {len(rows.start):,} rows" * folder.main)
        training = config.start.train
        steps = OrderedRows(rows.start, MixedSampler(rows.start, config.start.rows, seed=config.seed), training.steps)
        figures |= train("start", model, plain(), steps, folder, training, config.seed, measures.scorer(None))
        if folder.main:
            pretrain.save(model, rows.tokenizer, folder, "start")
    if folder.main:
        folder.store("start", {**figures, **measures(model, None)})
    return where


def run_variant(
    name: str, config: Config, folder: RunFolder, rows: LiftRows, where: str | Path, compared: Callable[[], Reference]
) -> None:
    """Train a variant, and its second stage; evaluate, save; skipped where the run has it."""
    variant, training = VARIANTS[name], lifting.training_of(config, rows)
    stages = [(name, variant, training, where)]
    if config.second.epochs:
        second = dataclasses.replace(config.train, **dataclasses.asdict(config.second))
        again = dataclasses.replace(variant, remove=None)
        later = lifting.training_of(dataclasses.replace(config, train=second), rows)
        stages.append((f"{name}, second stage", again, later, folder / "models" / name))
    for label, stage, how, start in stages:
        if label in folder.results():
            continue
        with keys.first_rank_first():  # the first rank saved what others start from
            model = lifting.load_model(start, config)
        reference = compared()
        method = lifting.build_method(stage, config, reference)
        steps = lifting.build_steps(stage, config, rows, how.steps)
        if folder.main:
            print(f"\n{label}\n{method.explain(model)}")
        measures = Measures(config, rows)
        score, optimizer = measures.scorer(reference), lifting.build_optimizer(model, how)
        figures = train(label, model, method, steps, folder, how, config.seed, score, optimizer=optimizer)
        if folder.main:
            pretrain.save(model, rows.tokenizer, folder, label)
            found = {
                **figures,
                **measures(model, reference),
                "gradients": lifting_scores.gradient_line(folder, label, stage),
            }
            folder.store(label, {**found, "method": method.describe()})


def write_report(config: Config, folder: RunFolder, rows: LiftRows, seconds: str) -> str:
    """The tables, printed and written with their plots."""
    results = folder.results()
    names = [n for name in ("start", *config.variants) for n in (name, f"{name}, second stage") if n in results]
    lines = [lifting_scores.result_line(name, results[name], rows) for name in names]
    gradients = [{"model": name, **results[name]["gradients"]} for name in names if "gradients" in results[name]]
    by_category = [
        {
            "model": name,
            **{f"{c} {what}": v for what in ("refusals", "loss", "kl") for c, v in results[name][what].items()},
        }
        for name in names
    ]
    tables = {
        "Refusal rates, losses and divergences on held-back rows (nats per token)": lines,
        "What the steps did": gradients,
        "By category": by_category,
        "The refusal detector on its labelled set": [results["start"]["detector"]],
        "What they write": [
            {"model": name, "question and answer": said} for name in names for said in results[name]["said"].values()
        ],
        "Cost": [report.cost_line(results[name], name) for name in names if "seconds" in results[name]],
    }
    notes = [
        f"Refusals of {rows.lifted} are to be lifted; those of {', '.join(rows.kept) or 'no category'} are to be kept. "
        "KL: of the model at the start from the variant.",
        *lifting_scores.rounding_notes(config, results),
        f"Wall time of the last start: {seconds}.",
    ]
    figures = {"Refusal lifted, and what changed elsewhere": lifting_scores.trade_off(lines, rows)}
    if (cosines := lifting_scores.cosine_curves(folder, names)) is not None:
        figures["Cosine with the gradient towards the reference"] = cosines
    report.write(folder, "Lifting a refusal by opposed projection", tables, figures, notes)
    texts = [evaluation.table(tables[name]) for name in list(tables)[:2]]
    return "\n\n".join([*texts, evaluation.table([results["start"]["detector"]]), *notes[1:-1]])


def main(config: Config) -> RunFolder:
    started = time.perf_counter()
    if unknown := [name for name in config.variants if name not in VARIANTS]:
        raise PlanError(f"variants are {', '.join(VARIANTS)}, not {', '.join(unknown)}.")
    config = toy(config) if config.smoke else config
    stored = deciding(config, ["variants"])  # more of them may be added later
    folder = RunFolder(
        f"{config.out}/{config.name or f'seed{config.seed}-{digest(stored)}'}",
        stored,
        config.overwrite,
        main=keys.main_rank(),
    )
    rows = load_rows(config, None if config.model is None else lifting.load_tokenizer(config))
    where = make_start(config, folder, rows)
    with keys.first_rank_first():
        shared = lifting.build_reference(config, where, rows, folder)

    def compared() -> Reference:
        one_model = config.reference == "snapshot"  # and each model has a snapshot of its own
        return lifting.build_reference(config, where, rows, folder) if one_model else shared

    for name in config.variants:
        run_variant(name, config, folder, rows, where, compared)
    if folder.main:
        table = write_report(config, folder, rows, report.since(started))
        print(f"\n{table}\n\n{folder.path}/report.html ({report.since(started)})")
    return folder


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        main(jsonargparse.auto_cli(Config, as_positional=False))
