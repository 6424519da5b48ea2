"""The keys of a run: given, drawn from a seed, or drawn once and kept beside the runs, never in a run's folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gradsurgery.anatomy import Anatomy
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.files import write_text
from gradsurgery.keys import PermutationKey


@dataclass
class DrawConfig:
    """How keys are drawn where none is given.

    Args:
        fraction: Share of the entries that a key moves, both ends counted.
        attention_ratio: Share of that which lies in attention.
        of: What ``fraction`` is a share of: entries of heads and neurons, or all.
        pairing: Both ends of a swap in different layers, or anywhere.
        attention: Move whole heads, or the columns of the output projection alone.
        mlp: Move whole neurons, or what makes their activation (up) or reads it (down) alone.
        count: Number of disjoint keys: tiers C2, C3, ….
    """

    fraction: float = 0.2
    attention_ratio: float = 0.25
    of: Literal["swappable", "all"] = "swappable"
    pairing: Literal["cross_layer", "any"] = "cross_layer"
    attention: Literal["full", "output"] = "full"
    mlp: Literal["full", "up", "down"] = "full"
    count: int = 1


def draw_keys(config: DrawConfig, anatomy: Anatomy, seed: int | None) -> list[PermutationKey]:
    """Keys from a seed, or from the operating system's entropy."""
    drawn: Any = PermutationKey.generate(anatomy, **dataclasses.asdict(config), seed=seed)
    return drawn if isinstance(drawn, list) else [drawn]


def load_keys(paths: Sequence[str | Path]) -> list[PermutationKey]:
    return [PermutationKey.load(path) for path in paths]


def key_paths(folder: str | Path, name: str, count: int) -> list[Path]:
    """Where the keys of a run are kept: ``keys/<run>.json``, numbered where there are several."""
    return [Path(folder) / f"{name}{f'-{k + 1}' if count > 1 else ''}.json" for k in range(count)]


def kept_keys(
    config: DrawConfig, anatomy: Anatomy, seed: int | None, paths: Sequence[Path], run: Path, overwrite: bool = False
) -> list[PermutationKey]:
    """The keys of a run at ``paths``; at its first start they are drawn and written there, readable by their owner.

    Raises:
        PlanError: the paths lie inside the run's folder, which people share.
        ArtefactError: the run exists and a key of it is not there any more.
    """
    if any(run.resolve() in path.resolve().parents for path in paths):
        raise PlanError(f"keys are kept outside of the run's folder {run}, not at {paths[0]}: choose key_folder.")
    if all(path.is_file() for path in paths):
        return load_keys(paths)
    if seed is None and (run / "config.yaml").is_file() and not overwrite:
        missing = next(path for path in paths if not path.is_file())
        raise ArtefactError(
            f"the run {run} is there and its key {missing} is not: put it back, or choose another name."
        )
    keys = draw_keys(config, anatomy, seed)
    hide(paths[0].parent)
    for key, path in zip(keys, paths, strict=True):
        key.save(path)
    return keys


def hide(folder: Path) -> None:
    """Make a folder of keys one that git ignores and others may not list."""
    if not folder.is_dir():
        folder.mkdir(parents=True, mode=0o700)
    if not (folder / ".gitignore").exists():
        write_text(folder / ".gitignore", "*\n")


def first_rank_first() -> AbstractContextManager[Any]:
    """Inside the block the first rank goes ahead: the others find what it wrote."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available()).main_process_first()


def main_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
