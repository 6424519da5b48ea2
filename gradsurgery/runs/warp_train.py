"""Phase 3 of a run of WaRP: the method and the rows of each variant."""

from __future__ import annotations

import dataclasses
import math

from torch import nn

import gradsurgery as gs
from gradsurgery import methods
from gradsurgery.data import MixedSampler
from gradsurgery.errors import ArtefactError
from gradsurgery.estimators import Basis, Coordinates, Masks, identity_basis
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.opposed import LiftConfig
from gradsurgery.runs.steps import OrderedRows, OrderedStreams, Steps
from gradsurgery.runs.warp import VARIANTS, WarpConfig
from gradsurgery.runs.warp_phases import mask_path
from gradsurgery.runs.warp_rows import PROTECTED, TASK, WarpRows
from gradsurgery.surgery import Method, Pass


@dataclasses.dataclass(frozen=True)
class Kept:
    """What the earlier phases left, for a model."""

    basis: RunFolder
    importance: RunFolder

    def require(self, name: str, ratio: float | None) -> None:
        """Check that a variant has what it takes, before anything is trained.

        Raises:
            ArtefactError: an earlier phase did not make it; the message says which option does.
        """
        ways = {"output": "--basis.outputs true", "task": "--importance.task true"}
        ways |= {"original": "--importance.original true", "rotated": f"--importance.ratios [{ratio}]"}
        for label in TAKES.get(name, ()):
            path = (
                mask_path(self.importance, label, ratio) if ratio is not None else self.basis / f"{label}.safetensors"
            )
            if not path.is_file():
                raise ArtefactError(f"{name} takes {path}, which is not there: run that phase with {ways[label]}.")

    def side(self, side: str, model: nn.Module) -> Basis:
        return Basis.load(self.basis / f"{side}.safetensors", model)

    def masks(self, label: str, ratio: float, basis: Basis) -> Masks:
        return Masks.load(mask_path(self.importance, label, ratio), basis)


TAKES = {"mask": ("original",), "warp": ("rotated",), "warp_minus": ("rotated", "task"), "actsvd": ("output",)}
"""Which files of the earlier phases a variant takes besides the bases of inputs."""


def build_method(
    name: str, ratio: float | None, config: WarpConfig, model: nn.Module, kept: Kept
) -> tuple[Method, Coordinates | None]:
    """A variant's method, and the coordinates that it keeps."""
    keeps = VARIANTS[name].keeps
    if name == "mixed":
        return methods.mixed(config.mix_weight), None
    if keeps == "nothing":
        return methods.plain(), None
    basis = kept.side("output" if keeps == "rows" else "input", model)
    if keeps == "others":
        rest = basis.rest
        return Method([Pass("linear", under=[gs.mask(rest)])], update=[gs.freeze(rest)]), None
    if keeps == "columns":
        return methods.gpm(basis, config.energy, config.others), Coordinates(basis.top(energy=config.energy))
    if keeps == "rows":
        most = basis.top(energy=config.energy)
        return methods.actsvd(basis, energy=config.energy, others=config.others), Coordinates(most)
    assert ratio is not None
    if keeps == "entries":
        own = identity_basis(model, list(basis.sites))
        masks = kept.masks("original", ratio, own)
        return methods.original_space_mask(masks, others=config.others), Coordinates(own, masks)
    masks = kept.masks("rotated", ratio, basis)
    if name == "warp_minus":
        masks = masks - kept.masks("task", ratio, basis)
    return methods.warp(basis, masks, others=config.others), Coordinates(basis, masks)


def build_steps(name: str, config: WarpConfig, rows: WarpRows, steps: int) -> Steps:
    """The rows of each step."""
    task = OrderedRows(rows.task, MixedSampler(rows.task, {TASK: config.rows}, seed=config.seed), steps)
    if name != "mixed":
        return task
    sampler = MixedSampler(rows.protected, {PROTECTED: config.protected_rows}, seed=config.seed)
    return OrderedStreams({TASK: task, PROTECTED: OrderedRows(rows.protected, sampler, steps)})


def training_of(config: WarpConfig, rows: WarpRows) -> LiftConfig:
    """The training with epochs counted in steps."""
    if not config.train.epochs:
        return config.train
    epoch = math.ceil(len(rows.task) / config.rows)
    return dataclasses.replace(config.train, steps=epoch * config.train.epochs)
