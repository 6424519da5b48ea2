"""Folders of the phases of a run of WaRP: which options decide them, the latest that fits, and whether they do fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gradsurgery.errors import ArtefactError
from gradsurgery.runs import keys
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.setup import digest
from gradsurgery.runs.warp import PHASES, WarpConfig, learns_first

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
    return RunFolder(_path(config, phase), deciding(config, phase), config.overwrite, main=keys.main_rank())


def finished(config: WarpConfig, phase: str) -> RunFolder | None:
    """The folder of a phase that is done, and not to be done again."""
    return open_phase(config, phase) if phase in _results(_path(config, phase)) and not config.overwrite else None


def _path(config: WarpConfig, phase: str) -> Path:
    return Path(config.out) / f"{phase}-seed{config.seed}-{digest(deciding(config, phase))}"


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
