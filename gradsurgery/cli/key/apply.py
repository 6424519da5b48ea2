"""``gradsurgery key apply``: a checkpoint with the key applied, C2 as a plain model for other tools."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from gradsurgery.anatomy.dissect import dissect
from gradsurgery.cli.key.checkpoint import exchange_files, weight_files
from gradsurgery.cli.key.describe import warn_of_differences
from gradsurgery.cli.key.reload import exchange_loaded
from gradsurgery.cli.key.show import load
from gradsurgery.cli.models import config_of, on_meta
from gradsurgery.errors import ArtefactError, KeyStateError, PlanError
from gradsurgery.files import atomic_folder, read_json, write_json
from gradsurgery.formats import stamp, upgraded

MARK = "gradsurgery.json"
"""File that says that a checkpoint is C2; ``from_pretrained`` does not read it."""
KIND = "what a checkpoint says of its keys"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf"}
"""Suffixes of files that hold weights or moments: carried over in C1 they would contradict the others."""


def apply(options: argparse.Namespace) -> None:
    """Write the checkpoint; see ``gradsurgery key apply --help``."""
    key, source, output = load(options.key), options.checkpoint.expanduser(), options.output.expanduser()
    if not (source / "config.json").is_file():
        raise ArtefactError(f"{source} holds no config.json. Name a folder written by save_pretrained.")
    if output.exists() or output.is_symlink():
        raise ArtefactError(f"{output} exists; name a folder that does not.")
    config = config_of(str(source))
    if getattr(config, "quantization_config", None) is not None:
        raise PlanError(f"{source} is quantised, and parts of packed weights cannot be swapped; key it before that.")
    model = on_meta(config, options.auto_class)
    anatomy = dissect(model)
    key.validate(anatomy)
    warn_of_differences(key, anatomy, model)
    applied = toggled(applied_keys(source), key.fingerprint, source)
    with atomic_folder(output, private=bool(applied)) as staging:
        files = weight_files(source)
        if not (files and exchange_files(files, staging, key, anatomy, model)):
            exchange_loaded(source, staging, key, anatomy, model)
        left = carry_over(source, staging)
        if applied:
            write_json(staging / MARK, mark(applied, anatomy.fingerprint))
    if left:
        print(f"left out: {', '.join(left)}")
    if applied:
        keys = " and ".join(applied)
        print(f"{output} is C2 (key {keys}): as secret as the key. Applied again, {applied[-1]} comes off.")
    else:
        print(f"{output} is C1.")


def applied_keys(folder: Path) -> list[str]:
    """Fingerprints of the keys that are applied to a checkpoint, in their order; none in C1.

    Raises:
        ArtefactError: its mark is damaged, or of another format.
    """
    path = folder / MARK
    if not path.is_file():
        return []
    data = upgraded(read_json(path, KIND), KIND, path, "apply the key to the public checkpoint again")
    keys = data.get("keys")
    if not isinstance(keys, list) or not all(isinstance(one, str) for one in keys):
        raise ArtefactError(
            f"{path} does not say which keys are applied; apply the key to the public checkpoint again."
        )
    return keys


def toggled(applied: list[str], fingerprint: str, folder: Path) -> list[str]:
    """The keys after one more: keys that share slots come off in the reverse order only.

    Raises:
        KeyStateError: another key lies on top of this one.
    """
    if fingerprint not in applied:
        return [*applied, fingerprint]
    if applied[-1] != fingerprint:
        raise KeyStateError(
            f"{folder} is C2 of key {applied[-1]} on top of {fingerprint}: take {applied[-1]} off first."
        )
    return applied[:-1]


def mark(applied: list[str], model: str) -> dict[str, object]:
    says = (
        "These weights are C2, a permutation of the public ones by the keys named here: keep them as secret as a key."
    )
    return {
        **stamp(KIND, "version"),
        "configuration": "C2",
        "keys": applied,
        "model": model,
        "says": says,
    }


def carry_over(source: Path, staging: Path) -> list[str]:
    """Copy what is neither weights nor the state of a training run; returns the names of files that were left out."""
    left = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if not path.is_file() or name == Path(MARK) or name.parts[0].startswith("."):
            continue
        if path.suffix in WEIGHTS or name.name in ("surgery.json", "trainer_state.json"):
            if not (staging / name).exists():
                left.append(str(name))
        elif not name.name.endswith(".index.json"):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / name)
    return left
