"""The phases of a run of WaRP before training: each has a folder, finds those before it, and checks that they fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

import gradsurgery as gs
from gradsurgery.data import ChatRows, MixedSampler
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.estimators import Basis, Masks, identity_basis, importance, top_k
from gradsurgery.methods import plain
from gradsurgery.runs import keys, lifting, pretrain
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.setup import build_model, digest
from gradsurgery.runs.steps import OrderedRows
from gradsurgery.runs.train import train
from gradsurgery.runs.warp import PHASES, WarpConfig, learns_first, loading
from gradsurgery.runs.warp_layers import weights_of
from gradsurgery.runs.warp_rows import PROTECTED, TASK, WarpRows, load_rows

_DATA = (
    *("model", "gguf_file", "dtype", "protected", "template", "glosses", "context", "validation", "seed", "smoke"),
    *("max_new_tokens", "task_tokens"),  # a model from scratch has positions for them
)
_DECIDES = {
    "behaviour": (*_DATA, "behaviour"),
    "basis": (*_DATA, "behaviour", "layers", "projections", "basis"),
    "importance": (*_DATA, "behaviour", "layers", "projections", "basis", "importance"),
}
_TASK = "task", "language", "task_samples"
_NEVER = "out", "overwrite", "variants", *(f"{phase}_run" for phase in PHASES[:-1])


def deciding(config: WarpConfig, phase: str) -> dict[str, Any]:
    """The part of the configuration that decides a phase's result, those of earlier phases included."""
    every = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NEVER}
    if not learns_first(config):
        every.pop("behaviour")
    names = _DECIDES.get(phase, tuple(every))
    names += _TASK if phase == "importance" and config.importance.task else ()
    return json.loads(json.dumps({name: every[name] for name in names if name in every}))  # type: ignore[no-any-return]


def open_phase(config: WarpConfig, phase: str) -> RunFolder:
    """The folder of a phase: ``<phase>-seed<seed>-<digest of what decides it>``."""
    stored = deciding(config, phase)
    name = f"{phase}-seed{config.seed}-{digest(stored)}"
    return RunFolder(Path(config.out) / name, stored, config.overwrite, main=keys.main_rank())


def find_phase(config: WarpConfig, phase: str) -> RunFolder:
    """The folder of an earlier phase: the one that is named, or the latest finished one that fits.

    Raises:
        ArtefactError: there is none; the message says in what the latest one differs.
    """
    given: str | None = getattr(config, f"{phase}_run")
    wanted = deciding(config, phase)
    if given is not None:
        found = [Path(given)]
        if phase not in _results(found[0]):
            raise ArtefactError(f"{given} holds no finished phase {phase!r}; run it first, or leave --{phase}_run out.")
    else:
        done = (path for path in Path(config.out).glob(f"{phase}-*/results.json") if phase in _results(path.parent))
        found = [path.parent for path in sorted(done, key=lambda path: path.stat().st_mtime, reverse=True)]
    gaps = []
    for path in found:
        stored = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        stored.pop("gradsurgery", None)
        gaps.append(_differences(stored, wanted))
        if not gaps[-1]:
            return RunFolder(path, stored, main=keys.main_rank())
    if not gaps:
        raise ArtefactError(
            f"there is no finished phase {phase!r} in {config.out}: run `warp.py {phase}` with these options first, or "
            f"name its folder, --{phase}_run."
        )
    raise ArtefactError(
        f"{found[0]} is the latest phase {phase!r}, and it has {'; '.join(gaps[0][:3])}: repeat it with these options, "
        f"or give this phase those."
    )


def _results(path: Path) -> dict[str, Any]:
    if not (path / "config.yaml").is_file() or not (path / "results.json").is_file():
        return {}
    found: dict[str, Any] = json.loads((path / "results.json").read_text(encoding="utf-8"))
    return found


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``"basis.samples=50, not 500"`` for every option in which two configurations differ."""
    out = []
    for name in {**wanted, **stored}:
        a, b = stored.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            out.append(f"{prefix}{name}={a!r}, not {b!r}")
    return out


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
    folder = open_phase(config, "behaviour")
    if "behaviour" in folder.results():
        return folder
    options = config.behaviour
    rows = load_rows(config, None if config.model is None else lifting.load_tokenizer(loading(config)))
    if config.model is None:
        answers = max(config.max_new_tokens, config.task_tokens)  # of a prompt that fills a row
        shape = dataclasses.replace(options.model, context=config.context + answers)
        model = build_model(shape, rows.tokenizer, config.seed)
    else:
        model = lifting.load_model(config.model, loading(config))
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
    folder = open_phase(config, "basis")
    if "basis" in folder.results():
        return folder
    options = config.basis
    model, rows = load(config)
    names = weights_of(model, config.layers, config.projections)
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
    folder = open_phase(config, "importance")
    if "importance" in folder.results():
        return folder
    options = config.importance
    model, rows = load(config)
    require_weights(model, before, "basis")
    rotated = Basis.load(before / "input.safetensors", model)
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


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of a sample of every parameter: names and shapes alone would not tell one training from another."""
    out = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(flat.numel() // 4096, 1)].cpu().contiguous()
        out.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return out.hexdigest()[:16]


def require_weights(model: nn.Module, folder: RunFolder, phase: str) -> None:
    """Raise unless a phase was made with these very weights."""
    made, here = folder.results()[phase]["weights"], weights_digest(model)
    if made != here:
        raise ArtefactError(
            f"{folder.path} was made from other weights ({made}; the model's are {here}): the model changed since, so "
            f"run phase {phase!r} again."
        )


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
