"""One variant of a supervised run with a quarantine: trained, measured with it and without it, probed, saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

import gradsurgery as gs
from gradsurgery import evaluation
from gradsurgery.adapters import Adapter, Kinds, Quantile
from gradsurgery.data import MixedSampler
from gradsurgery.estimators.direction import Direction
from gradsurgery.runs import pretrain
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.metrics import Scorer
from gradsurgery.runs.quarantine_controls import Variant, direction_for, method_for
from gradsurgery.runs.quarantine_sft import FILTER, VARIANTS, QuarantineSftConfig
from gradsurgery.runs.quarantine_sft_rows import SftData
from gradsurgery.runs.quarantine_sft_start import add_adapter, load_model, losses_of, optimizer_of
from gradsurgery.runs.steps import OrderedRows
from gradsurgery.runs.train import train
from gradsurgery.surgery import Method


def find_direction(
    variant: Variant, model: nn.Module, adapter: Adapter, folder: RunFolder, loaded: SftData, seed: int
) -> Direction | None:
    """A variant's direction, kept in the run's folder: the adapter is the same for all variants at the start."""
    if variant.direction is None:
        return None
    path = folder / f"direction-{variant.direction}.safetensors"
    if not path.is_file():
        found = direction_for(variant, model, adapter, loaded.pairs, loaded.placebo, seed=seed)
        assert found is not None
        if not folder.main:
            return found
        found.save(path)
    return Direction.load(path, adapter)


def build_method(
    name: str, config: QuarantineSftConfig, adapter: Adapter, direction: Direction | None, kinds: Kinds
) -> Method:
    """A variant's method, for ``adapter.host``."""
    threshold = Quantile(config.score.quantile, config.score.halflife)
    method = method_for(VARIANTS[name], adapter, direction, threshold, config.score.by, kinds=kinds)
    if name == FILTER:
        return dataclasses.replace(method, passes=[dataclasses.replace(p, rows="~flag") for p in method.passes])
    return method


def scorer(adapter: Adapter, sequences: Mapping[str, Tensor], rows: int) -> Scorer:
    """Losses on a sample with the quarantine and without it, for the curves."""
    sample = {name: ids[:rows] for name, ids in sequences.items()}

    def score(model: nn.Module) -> dict[str, float]:
        found = {f"on/{name}": loss for name, loss in losses_of(adapter.model, sample).items()}
        with adapter.without("quarantine"):
            return found | {f"off/{name}": loss for name, loss in losses_of(adapter.model, sample).items()}

    return score


def run_variant(name: str, where: str | Path, config: QuarantineSftConfig, folder: RunFolder, loaded: SftData) -> None:
    """Train, evaluate, throw the quarantine away, evaluate again, probe, save; skipped where the run has it."""
    if name in folder.results():
        return
    variant = VARIANTS[name]
    model = load_model(where, config)
    adapter = add_adapter(model, config)
    optimizer = optimizer_of(adapter, config)
    measure = find_direction(VARIANTS["score"], model, adapter, folder, loaded, config.seed)
    direction = find_direction(variant, model, adapter, folder, loaded, config.seed)
    method = build_method(name, config, adapter, direction, Kinds(names=loaded.rows.categories))
    sampler = MixedSampler(loaded.rows, config.rows, seed=config.seed)
    if folder.main:
        print(f"\n{name}: {variant.about}\n{method.explain(adapter.host)}", flush=True)
    steps = OrderedRows(loaded.rows, sampler, config.train.steps)
    score = scorer(adapter, loaded.held_back, config.train.eval_rows)
    host: Any = adapter.host
    about = adapter.describe(optimizer)  # now: the schedule ends at a learning rate of zero
    figures: dict[str, Any] = {
        **train(name, host, method, steps, folder, config.train, config.seed, score, optimizer=optimizer)
    }
    if not folder.main:
        return
    figures |= {"method": method.describe(), "adapter": about}
    figures |= {"during": during(name, folder), "on": losses_of(model, loaded.held_back)}
    assert measure is not None
    figures["cosines"] = cosines_of(adapter, measure, loaded.held_back, config.train.eval_rows)
    adapter.save(folder / "models" / f"{name}-adapter.safetensors")
    adapter.ablate_()
    figures["off"] = losses_of(model, loaded.held_back)
    adapter.fold_()
    adapter.remove()
    pretrain.save(model, loaded.tokenizer, folder, name)
    level = figures["on"]["forget"] if name == "plain" else folder.results()["plain"]["on"]["forget"]
    figures["relearn"] = probe(model, level, config, loaded)
    folder.store(name, figures)


def measure_start(where: str | Path, config: QuarantineSftConfig, folder: RunFolder, loaded: SftData) -> None:
    """The model before the adapter, which never saw the forget text: its losses, and how soon it learns it."""
    if "start" in folder.results() or not folder.main:
        return
    model = load_model(where, config)
    level = folder.results()["plain"]["on"]["forget"]
    folder.store("start", {"on": losses_of(model, loaded.held_back), "relearn": probe(model, level, config, loaded)})


def during(name: str, folder: RunFolder) -> dict[str, float]:
    """Means over the training's metric lines of what the quarantine measured; the first tenth is left out."""
    lines = [line for line in folder.metrics if line.get("model") == name and "loss" in line]
    found: dict[str, list[float]] = {}
    for line in lines[len(lines) // 10 :]:
        for key, value in line.items():
            if key.startswith("quarantine/"):
                found.setdefault(key.removeprefix("quarantine/"), []).append(value)
    return {key: fmean(values) for key, values in found.items()}


def cosines_of(adapter: Adapter, direction: Direction, sequences: Mapping[str, Tensor], rows: int) -> dict[str, float]:
    """Mean cosine of held-back rows' gradients, after training, with the direction that the pairs had before it."""
    out = {}
    for kind, ids in sequences.items():
        sample = ids[:rows].long()
        out[kind] = float(gs.adapters.cosines(adapter, direction, {"input_ids": sample, "labels": sample}).mean())
    return out


def probe(model: PreTrainedModel, level: float, config: QuarantineSftConfig, loaded: SftData) -> dict[str, Any]:
    """Relearning by full finetuning, up to the forget loss of ``plain``."""
    options = config.relearn
    if not options.steps:
        return {}
    most = options.steps * options.rows // 2  # no sequence comes twice
    found = evaluation.relearn(
        model,
        None,
        loaded.training("forget", most),
        loaded.training("retain", most),
        level,
        held_back=(loaded.held_back["forget"][: options.test_rows], loaded.held_back["retain"][: options.test_rows]),
        steps=options.steps,
        every=options.every,
        batch_size=options.rows,
        lr=options.rate,
        seed=config.seed,
        restore=False,
    )
    return {"steps": found.steps, "level": level, "curve": found.rows()}
