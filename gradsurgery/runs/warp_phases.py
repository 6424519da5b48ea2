"""The phases of a run of WaRP before training: a behaviour, bases of what it reads, masks of what it needs."""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import gradsurgery as gs
from gradsurgery.data import ChatRows, MixedSampler
from gradsurgery.errors import PlanError
from gradsurgery.estimators import Basis, Masks, identity_basis, importance, top_k
from gradsurgery.methods import plain
from gradsurgery.runs import lifting, pretrain
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.setup import build_model
from gradsurgery.runs.steps import OrderedRows
from gradsurgery.runs.train import train
from gradsurgery.runs.warp import WarpConfig, learns_first, loading
from gradsurgery.runs.warp_find import find_phase, finished, open_phase, require_weights, weights_digest
from gradsurgery.runs.warp_layers import weights_of
from gradsurgery.runs.warp_rows import PROTECTED, TASK, WarpRows, load_rows


def starting_point(config: WarpConfig) -> str | Path:
    """What the later phases load: what phase 0 left, or the given model."""
    return find_phase(config, "behaviour") / "models/start" if learns_first(config) else str(config.model)


def load(config: WarpConfig) -> tuple[PreTrainedModel, WarpRows]:
    """The model that is to be protected, on the accelerator where there is one, and its rows."""
    where = starting_point(config)
    tokenizer = (
        AutoTokenizer.from_pretrained(where) if learns_first(config) else lifting.load_tokenizer(loading(config))
    )
    model = lifting.load_model(where, loading(config))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    _require_positions(model, config)
    moved: Any = model.to(device)  # type: ignore[arg-type]
    return moved, load_rows(config, tokenizer)


def _require_positions(model: PreTrainedModel, config: WarpConfig) -> None:
    answers = max(config.max_new_tokens, config.task_tokens)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and config.context + answers > most:
        raise PlanError(
            f"prompts of up to {config.context} tokens with {answers} of an answer do not fit {type(model).__name__}, "
            f"which has {most} positions: choose a smaller --context or --task_tokens."
        )


def behaviour(config: WarpConfig) -> RunFolder:
    """Phase 0: train the behaviour to protect, from scratch or on top of a given model.

    Raises:
        PlanError: the model is given, and the phase was not asked for.
    """
    if not learns_first(config):
        raise PlanError("with a model of your own phase 0 is left out; --behaviour.wanted true trains it first.")
    if (done := finished(config, "behaviour")) is not None:
        return done
    options = config.behaviour
    rows = load_rows(config, None if config.model is None else lifting.load_tokenizer(loading(config)))
    if config.model is None:
        answers = max(config.max_new_tokens, config.task_tokens)  # of a prompt that fills a row
        shape = dataclasses.replace(options.model, context=config.context + answers)
        model = build_model(shape, rows.tokenizer, config.seed)
    else:
        model = lifting.load_model(config.model, loading(config))
    folder = open_phase(config, "behaviour")
    print(f"\nbehaviour: {model.num_parameters():,} parameters, {len(rows.behaviour):,} rows" * folder.main)
    sampler = MixedSampler(rows.behaviour, options.rows, seed=config.seed)
    steps = OrderedRows(rows.behaviour, sampler, options.train.steps)
    with measured() as cost:
        figures = train("behaviour", model, plain(), steps, folder, options.train, config.seed)
        if folder.main:
            pretrain.save(model, rows.tokenizer, folder, "start")
    if folder.main:
        folder.store("behaviour", {**figures, **cost})
    return folder


def basis(config: WarpConfig) -> RunFolder:
    """Phase 1: bases of what the chosen layers read, and give out, on the protected rows."""
    _require_one_process("basis")
    if (done := finished(config, "basis")) is not None:
        return done
    options = config.basis
    model, rows = load(config)
    names = weights_of(model, config.layers, config.projections)
    folder = open_phase(config, "basis")
    taken = dataclasses.asdict(options)
    for name in ("samples", "rows", "outputs", "store"):
        taken.pop(name)
    tables = {}
    with measured() as cost:
        batches = _batches(rows.protected, PROTECTED, options.samples, options.rows)
        for side in ("input", "output") if options.outputs else ("input",):
            path = folder / f"{side}.safetensors"
            if path.is_file():  # an interrupted phase goes on; files appear whole
                made = Basis.load(path, model)
            else:
                made = gs.estimators.activation_basis(
                    model, batches, names, side=side, dtype=getattr(torch, options.store), progress=True, **taken
                )
                made.save(path)
            tables[side] = made.table()
    folder.store("basis", {"weights": weights_digest(model), "tables": tables, **cost})
    return folder


def importances(config: WarpConfig) -> RunFolder:
    """Phase 2: masks of the coordinates that the protected rows need most, for every ratio."""
    _require_one_process("importance")
    before = find_phase(config, "basis")
    if (done := finished(config, "importance")) is not None:
        return done
    options = config.importance
    model, rows = load(config)
    require_weights(model, before, "basis")
    rotated = Basis.load(before / "input.safetensors", model)
    folder = open_phase(config, "importance")
    wanted = {"rotated": (rotated, rows.protected, PROTECTED)}
    if options.original:
        wanted["original"] = (identity_basis(model, list(rotated.sites)), rows.protected, PROTECTED)
    if options.task:
        wanted["task"] = (rotated, rows.task, TASK)
    with measured() as cost:
        for label, (own, of, category) in wanted.items():
            paths = {ratio: mask_path(folder, label, ratio) for ratio in options.ratios}
            if all(path.is_file() for path in paths.values()):
                continue
            batches = _batches(of, category, options.samples, options.rows)
            scores = importance(model, own, batches, per=options.per, progress=True)
            for ratio, path in paths.items():
                top_k(scores, ratio, options.scope).save(path)
    overlaps = {}
    if options.task:
        for ratio in options.ratios:
            ours, theirs = (Masks.load(mask_path(folder, kind, ratio), rotated) for kind in ("rotated", "task"))
            overlaps[f"{ratio:g}"] = ours.overlap(theirs)
    folder.store("importance", {"weights": weights_digest(model), "overlaps": overlaps, **cost})
    return folder


def mask_path(folder: RunFolder, label: str, ratio: float) -> Path:
    return folder / f"{label}-{ratio:g}.safetensors"


def _batches(rows: ChatRows, category: str, count: int, size: int) -> list[Any]:
    return list(rows.sample(count).batches(category, size))


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fills in ``seconds`` and ``peak_mib``: of the accelerator in the block, or else of the process so far."""
    out: dict[str, float] = {}
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield out
    out["seconds"] = round(time.perf_counter() - started, 2)
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    out["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else on_host, 1)


def _require_one_process(phase: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PlanError(f"phase {phase!r} runs in one process; start it without torchrun, then train with it.")
