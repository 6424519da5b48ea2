"""Finetune the keyed tier on private data, and hold the public tier to what it was.

``L = (1 - kl_weight) * CE(C2, private) + kl_weight * KL(C1 as it was || C1, public)``; only keyed entries move
(El Feghali et al. 2026, arXiv 2606.21638). By default the model is that of ``tiered_pretrain.py``, which is trained
first where it is not there yet; any stock checkpoint will do, with a key that fits it.

    python recipes/private_finetune.py
    python recipes/private_finetune.py --model path/or/name --key key.json --data my_texts/ --private "[notes]"
    python recipes/private_finetune.py --variants "[keyed,no_kl,not_permuted,lora,extract_public,extract_random_key]"
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import tiered_pretrain
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradsurgery as gs
from gradsurgery import evaluation
from gradsurgery.errors import PlanError
from gradsurgery.evaluation.tiers import tier_curves
from gradsurgery.files import write_json
from gradsurgery.runs import (
    RunFolder,
    deciding,
    digest,
    ending_in_a_sentence,
    finetune,
    keys,
    lora,
    pretrain,
    report,
    tiers,
    train,
)
from gradsurgery.runs.finetune import Start
from gradsurgery.runs.private import VARIANTS, PrivateConfig


@dataclass
class Config(PrivateConfig):
    """A private finetune; see ``PrivateConfig``.

    Args:
        pretrain: The run of ``tiered_pretrain.py`` to finetune where no model is given; its seed is this run's.
    """

    pretrain: tiered_pretrain.Config = field(default_factory=tiered_pretrain.Config)


def open_start(config: Config) -> Start:
    """The given checkpoint with its keys, or what the pretraining run left behind.

    Raises:
        PlanError: a model without a key, or not one key a stage.
    """
    given = [config.key] if isinstance(config.key, str) else config.key
    if config.model is None:
        if given:
            raise PlanError("key needs the model that it is for; the pretraining run has its own (pretrain.key).")
        done = tiered_pretrain.main(dataclasses.replace(config.pretrain, seed=config.seed))
        where, given = str(done.model), [str(path) for path in done.keys]
    else:
        where = config.model
    if not given or len(given) < len(config.private):
        raise PlanError(f"{len(config.private)} stages of private data need a key each; given are {given or 'none'}.")
    with keys.first_rank_first():
        tokenizer, model = AutoTokenizer.from_pretrained(where), AutoModelForCausalLM.from_pretrained(where)
    files = [str(path) for path in given[: len(config.private)]]
    return Start(where, keys.load_keys(files), files, tokenizer, gs.dissect(model))


def run_variant(
    name: str, stage: int, config: Config, folder: RunFolder, start: finetune.Start, texts: finetune.Texts
) -> None:
    """Train one stage of a variant, evaluate, save in C1; skipped where the run has it."""
    result, variant, key = finetune.result_name(name, stage, config), VARIANTS[name], start.keys[stage]
    if result in folder.results():
        return
    with keys.first_rank_first():  # the first rank saved what others start from
        model: Any = start.load(finetune.starting_point(name, stage, config, folder))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method, keyed = finetune.build_method(variant, stage, config, start), key.region(start.anatomy)
    training = config.train
    if variant.own_key and config.extract_steps is not None:
        training = dataclasses.replace(training, steps=config.extract_steps)
    steps = finetune.build_steps(method, stage, config, texts, training.steps)
    if variant.adapters:
        model = lora.add_adapter(model, keyed.numel())
    if folder.main:
        print(f"\n{result}\n{finetune.shown(method.explain(model))}")
    holders = finetune.holders_of(variant, stage, config, start)
    during = {who: found[0] for who, found in holders.items() if who[0] == "C" or who in ("own key", "adapters")}
    score = tiers.tier_scorer(during, start.anatomy, texts.sample(training))
    figures: dict[str, Any] = {**train(result, model, method, steps, folder, training, config.seed, score)}
    if not folder.main:
        return
    figures["entries"] = lora.trained(model) if variant.adapters else keyed.numel()
    if variant.adapters:
        model = lora.merged(model)
    elif not variant.own_key:
        figures["public entries changed"] = tiers.changed_entries(before, model, ~keyed)
    figures["scores"] = tiers.score_holders(model, holders, start.anatomy, texts.held_back)
    if config.guesses.draws and name in ("keyed", "no_decoys"):
        sample, draws = texts.sample(training), config.guesses.draws
        figures["attacks"] = tiers.attacks(model, key, start.anatomy, sample, draws, config.seed)
    pretrain.save(model, start.tokenizer, folder, result)
    folder.store(result, {**figures, "method": method.describe()})


def write_report(config: Config, folder: RunFolder, seconds: str) -> str:
    """The tables, printed and written with their plots."""
    results = folder.results()
    before = results["before"]["scores"]
    scores = {f"{holder}, before": figures for holder, figures in before.items()}
    lines, costs, recoveries = [], [], []
    curves: dict[str, Any] = {}
    for name in config.variants:
        for stage, private in enumerate(config.private):
            label = finetune.result_name(name, stage, config)
            view = finetune.trained_view(VARIANTS[name], stage)
            scores |= {f"{holder}, {label}": figures for holder, figures in results[label]["scores"].items()}
            lines.append({"variant": label, **finetune.summary(results[label], before, view, private)})
            costs.append(report.cost_line(results[label], label))
            if "attacks" in results[label]:
                recoveries += [{"model": label, **row} for row in results[label]["attacks"]["recovery"]]
                curves |= {f"{label}, {name}": curve for name, curve in results[label]["attacks"]["curves"].items()}
    tables = {
        "What finetuning brought, and to whom (nats per token)": lines,
        "Held-back scores": report.score_lines(scores, "holder, after"),
        "Cost": costs,
    }
    notes = [
        "Gain: how far below the tier's loss before finetuning a holder's loss is after it; shares are of the tier's.",
        f"Keys: {', '.join(folder.config['keys'])} (fingerprints). Wall time of the last start: {seconds}.",
    ]
    figures = {"Held-back loss of every holder": report.score_bars(scores)}
    if curves:
        tables["Telling keyed units by their weights (AUC 0.5 is chance)"] = recoveries
        figures["Loss under parts of the key, and under the key with mistakes"] = tier_curves(curves)
    report.write(folder, "Private finetuning of a keyed tier", tables, figures, notes)
    return f"{evaluation.table(report.score_lines(scores, 'holder, after'))}\n\n{evaluation.table(lines)}"


def stored_config(config: Config, start: Start) -> dict[str, Any]:
    """What decides the results, without what is as good as a key."""
    out = deciding(config, [*tiered_pretrain.SECRET, "variants"])  # more of them may be added later
    out["pretrain"] = deciding(config.pretrain, tiered_pretrain.SECRET) if config.model is None else None
    return {**out, "keys": [key.fingerprint for key in start.keys]}


def main(config: Config) -> RunFolder:
    started = time.perf_counter()
    if unknown := [name for name in config.variants if name not in VARIANTS]:
        raise PlanError(f"variants are {', '.join(VARIANTS)}, not {', '.join(unknown)}.")
    start = open_start(config)
    stored = stored_config(config, start)
    name = config.name or f"seed{config.seed}-{digest(stored)}"
    folder = RunFolder(f"{config.out}/{name}", stored, config.overwrite, main=keys.main_rank())
    texts = finetune.load_texts(config, start.tokenizer)
    if folder.main and "before" not in folder.results():
        holders = finetune.holders_of(VARIANTS["keyed"], 0, config, start)
        folder.store("before", {"scores": tiers.score_holders(start.load(), holders, start.anatomy, texts.held_back)})
    for variant in config.variants:
        for stage in range(len(config.private)):
            run_variant(variant, stage, config, folder, start, texts)
    if folder.main:
        write_json(folder / "key_files.json", start.key_files)  # where they are, for tiered_inference.py
        table = write_report(config, folder, report.since(started))
        print(f"\n{table}\n\n{folder.path}/report.html ({report.since(started)})")
    return folder


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        main(jsonargparse.auto_cli(Config, as_positional=False))
