"""Finetune without losing a behaviour: weight space rotation (WaRP) in phases, against masks, projections and mixing.

A small model learns to refuse questions about two topics and to answer others (``behaviour``). From its refusals come
bases of what its layers read (``basis``) and the coordinates that matter there (``importance``). Then each variant
trains on another task (``train``): what did the task gain, and what is left of the refusals?

    python recipes/warp.py all
    python recipes/warp.py all --smoke true
    python recipes/warp.py basis --layers late --projections "[ffn_down]"
    python recipes/warp.py all --config recipes/configs/warp/llama3_8b_gsm8k.yaml

The phases are behaviour (where no model is given), basis, importance and train; each takes the same options, finds the
latest run of the one before that fits, and is skipped where it is finished.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from gradsurgery import evaluation
from gradsurgery.errors import PlanError
from gradsurgery.runs import (
    RunFolder,
    ending_in_a_sentence,
    keys,
    lifting,
    pretrain,
    report,
    train,
    warp_find,
    warp_phases,
    warp_scores,
)
from gradsurgery.runs.warp import PHASES, VARIANTS, WarpConfig, expanded, learns_first, loading
from gradsurgery.runs.warp_rows import WarpRows
from gradsurgery.runs.warp_scores import Measures
from gradsurgery.runs.warp_train import Kept, build_method, build_steps, training_of

Config = WarpConfig


def toy(config: Config) -> Config:
    """The same run at the size of a smoke test."""
    small: dict[str, Any] = {"steps": 6, "eval_every": 3, "eval_rows": 4, "save_every": 2, "log_every": 1}
    behaviour = dataclasses.replace(config.behaviour, rows=8)
    behaviour = dataclasses.replace(behaviour, train=dataclasses.replace(behaviour.train, **{**small, "eval_every": 0}))
    return dataclasses.replace(
        config,
        glosses=dataclasses.replace(config.glosses, limit=80),
        behaviour=behaviour,
        basis=dataclasses.replace(config.basis, samples=40, rows=8),
        importance=dataclasses.replace(config.importance, samples=8, rows=4),
        train=dataclasses.replace(config.train, **small, epochs=0),
        validation=0.2,
        rows=4,
        protected_rows=2,
        test_rows=8,
        test_prompts=4,
        eval_prompts=2,
        max_new_tokens=6,
        task_tokens=min(config.task_tokens, 6),
    )


def run_train(config: Config) -> RunFolder:
    """Phase 3: train every variant on the task, evaluate, report."""
    started = time.perf_counter()
    kept = Kept(warp_find.find_phase(config, "basis"), warp_find.find_phase(config, "importance"))
    for name, ratio in expanded(config).values():
        kept.require(name, ratio)
    where = warp_phases.starting_point(config)
    with keys.first_rank_first():
        start, rows = warp_phases.load(config)
    for phase, before in (("basis", kept.basis), ("importance", kept.importance)):
        warp_find.require_weights(start, before, phase)
    folder = warp_find.open_phase(config, "train")
    measures = Measures(config, rows)
    if "start" not in folder.results() and folder.main:
        folder.store("start", measures(start))
    start = start.cpu()
    training = training_of(config, rows)
    for label, (name, ratio) in expanded(config).items():
        if label in folder.results():
            continue
        with keys.first_rank_first():
            model = lifting.load_model(where, loading(config))
        method, coordinates = build_method(name, ratio, config, model, kept)
        steps = build_steps(name, config, rows, training.steps)
        if folder.main:
            print(f"\n{label}: {VARIANTS[name].about}\n{method.explain(model)}")
        with warp_phases.measured() as cost:
            figures = train(label, model, method, steps, folder, training, config.seed, measures.scorer())
        if folder.main:
            pretrain.save(model, rows.tokenizer, folder, label.replace(" ", "_").rstrip("%"))
            moved = warp_scores.movement(model, start, coordinates)
            found = {**figures, "peak_mib": cost["peak_mib"], **measures(model), **moved}
            folder.store(label, {**found, "method": method.describe()})
    if folder.main:
        table = write_report(config, folder, kept, rows, report.since(started))
        print(f"\n{table}\n\n{folder.path}/report.html ({report.since(started)})")
    return folder


def write_report(config: Config, folder: RunFolder, kept: Kept, rows: WarpRows, seconds: str) -> str:
    """The tables, printed and written with their plots."""
    results = folder.results()
    names = [name for name in ("start", *expanded(config)) if name in results]
    lines = [warp_scores.result_line(name, results[name], rows) for name in names]
    phases = {"basis": kept.basis, "importance": kept.importance}
    if learns_first(config):
        phases = {"behaviour": warp_find.find_phase(config, "behaviour"), **phases}
    done = {phase: where.results()[phase] for phase, where in phases.items()}
    costs = {**done, **{name: results[name] for name in names if "seconds" in results[name]}}
    tables: dict[str, Any] = {
        "What the task gained and what is left of the refusals (losses in nats per token)": lines,
        "What the rotation adds: WaRP less the mask of the same size": warp_scores.rotation_line(lines),
        "Time and peak memory": [
            {"phase": name, "seconds": cost["seconds"], "peak MiB": cost["peak_mib"]} for name, cost in costs.items()
        ],
        "The bases of inputs": done["basis"]["tables"]["input"],
        "The refusal detector on its labelled set": [results["start"]["detector"]],
        "What they write": [
            {"model": name, "question and answer": said} for name in names for said in results[name]["said"].values()
        ],
    }
    tables = {name: table for name, table in tables.items() if table}
    notes = [
        "Attack success is the share of protected prompts that are not refused. Kept moved: how far the kept "
        "coordinates of the worst weight moved, relative to their norm.",
        f"Wall time of the last start of this phase: {seconds}.",
    ]
    figures = {"The task against the protected behaviour": warp_scores.trade_off(lines)}
    report.write(folder, "Finetuning with weight space rotation", tables, figures, notes)
    return "\n\n".join(evaluation.table(tables[name]) for name in list(tables)[:3])


RUN = {
    "behaviour": warp_phases.behaviour,
    "basis": warp_phases.basis,
    "importance": warp_phases.importances,
    "train": run_train,
}


def main(phase: str, config: Config) -> RunFolder:
    """Run one phase, or all that there are."""
    if phase != "all" and phase not in RUN:
        raise PlanError(f"phases are {', '.join(PHASES)} and all, not {phase!r}.")
    if unknown := [name for name in config.variants if name not in VARIANTS]:
        raise PlanError(f"variants are {', '.join(VARIANTS)}, not {', '.join(unknown)}.")
    if config.model is None and (config.protected is not None or config.task is not None):
        raise PlanError("data sets of prompts and responses need a model that can learn them: --model path/or/name.")
    config = toy(config) if config.smoke else config
    wanted = [p for p in PHASES if p != "behaviour" or learns_first(config)] if phase == "all" else [phase]
    for name in wanted:
        started = time.perf_counter()
        folder = RUN[name](config)
        if folder.main:
            print(f"\n{name}: {folder.path} ({report.since(started)})")
    return folder


def parse(words: Sequence[str]) -> tuple[str, Config]:
    """The phase, and its configuration."""
    import jsonargparse

    if not words or (words[0] not in (*PHASES, "all") and words[0] not in ("-h", "--help")):
        raise PlanError(f"give a phase first: warp.py {{{','.join((*PHASES, 'all'))}}} [options].")
    config: Config = jsonargparse.auto_cli(Config, as_positional=False, args=list(words[words[0][0] != "-" :]))
    return words[0], config


if __name__ == "__main__":
    with ending_in_a_sentence():
        main(*parse(sys.argv[1:]))
