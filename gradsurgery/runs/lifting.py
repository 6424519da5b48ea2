"""What a run that lifts refusals does: the model it starts from, its reference, a variant's method and rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import gradsurgery as gs
from gradsurgery import methods
from gradsurgery.data import ChatRows, MixedSampler, require_same_tokens
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.losses import Snapshot, kl, kl_divergence
from gradsurgery.losses.references.base import Reference
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.lifting_rows import LiftRows
from gradsurgery.runs.opposed import LiftConfig, OpposedConfig, Variant
from gradsurgery.runs.steps import OrderedRows, OrderedStreams, Steps
from gradsurgery.surgery import Method, Pass


def load_tokenizer(config: OpposedConfig) -> Any:
    """The tokenizer of the given model.

    Raises:
        ArtefactError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(config.model, **_gguf(config))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(
            f"{config.model} cannot be loaded ({reason}); give the folder of a stock checkpoint, or a name on the hub."
        ) from error


def load_model(where: str | Path, config: OpposedConfig) -> PreTrainedModel:
    """A checkpoint in the run's dtype."""
    options: dict[str, Any] = _gguf(config) if str(where) == config.model else {}
    if options:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, config.dtype), **options)


def _gguf(config: OpposedConfig) -> dict[str, Any]:
    return {} if config.gguf_file is None else {"gguf_file": config.gguf_file}


class StartSnapshot(Snapshot):
    """Keeps the values it was given: a second stage begins elsewhere, and is compared with the start all the same."""

    def take(self, model: nn.Module) -> None:
        if not self.taken:
            super().take(model)


def build_reference(config: OpposedConfig, where: str | Path, rows: LiftRows, folder: RunFolder) -> Reference:
    """What the model is compared with: itself as it was at the start, or a teacher.

    Raises:
        DataError: the teacher has another tokenizer.
        ArtefactError: log-probabilities cannot be stored; nothing is left of them.
    """
    if config.teacher is not None:
        require_same_tokens(rows.tokenizer, AutoTokenizer.from_pretrained(config.teacher))
        if config.reference == "snapshot":
            raise PlanError("a snapshot is the model's own; with a teacher the reference is frozen or cached.")
        where = config.teacher
    if config.reference == "cached":
        path = folder / "reference"
        if not path.is_dir():
            every = [part for part in (rows.train, rows.alignment, rows.held) if part is not None]
            gs.losses.precompute(path, load_model(where, config), _batches(every, config.rows), config.top_k)
        return gs.losses.cached(path, same_model=config.teacher is None)
    model = load_model(where, config)
    if config.reference == "snapshot":
        first, start = gs.losses.snapshot(gs.region(model, "*")), StartSnapshot(gs.region(model, "*"))
        first.take(model)
        start.load_state_dict(first.state_dict())
        return start
    return gs.losses.frozen(model.requires_grad_(False))


def _batches(every: list[ChatRows], size: int) -> Iterator[Any]:
    for rows in every:
        for name in rows.categories:
            yield from rows.batches(name, size)


def build_method(variant: Variant, config: OpposedConfig, reference: Reference) -> Method:
    """A variant's method, with what it is asked to measure."""
    weights: dict[str, Any] = {"positive_weight": config.positive_weight, "unlearn_weight": config.unlearn_weight}
    if variant.remove is None:
        method = methods.plain()
    elif variant.aligned:
        method = methods.safegrad(reference, remove=variant.remove, scope=config.scope, metrics="global")
    else:
        method = methods.opposed(
            reference,
            variant.remove,
            config.scope,
            variant.at,
            **weights,
            rows="opposed" if variant.mixed else None,
            kl=kl(padding=True) if variant.padding else kl_divergence,
            metrics="global",
        )
    if not (every := config.observe_every):
        return method
    if variant.remove is None:  # what projection would have kept clear of, from time to time
        rows = "opposed" if variant.mixed else None
        watch = Pass(
            "watch", kl_divergence, rows=rows, into="protect", when=gs.every(every), refs={"reference": reference}
        )
        method = dataclasses.replace(method, passes=[*method.passes, watch])
    observers = [gs.leak("protect", every=every), gs.changed_fraction(every=every)]
    return dataclasses.replace(method, update=[*method.update, *observers])


def build_optimizer(model: nn.Module, config: LiftConfig) -> torch.optim.Optimizer | None:
    """AdamW with learning rates by depth; ``None`` where all are the same."""
    if config.depth_rates is None:
        return None
    groups = gs.parameter_groups(
        model, config.learning_rate, depth=tuple(config.depth_rates), weight_decay=config.weight_decay
    )
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def training_of(config: OpposedConfig, rows: LiftRows) -> LiftConfig:
    """The training with epochs counted in steps."""
    training = config.train
    if not training.epochs:
        return training
    epoch = math.ceil(len(rows.train.of(rows.lifted)) / config.rows)
    return dataclasses.replace(training, steps=epoch * training.epochs, eval_every=epoch)


def build_steps(variant: Variant, config: OpposedConfig, rows: LiftRows, steps: int) -> Steps:
    """The rows of each step.

    Raises:
        PlanError: a variant without the rows it needs.
    """
    per_batch = {rows.lifted: config.rows}
    if variant.mixed:
        if not rows.plain:
            raise PlanError("a mixed variant trains other rows too: name them, --plain.source.")
        for k, name in enumerate(rows.plain):
            per_batch[name] = config.plain_rows // len(rows.plain) + (k < config.plain_rows % len(rows.plain))
    main = OrderedRows(rows.train, MixedSampler(rows.train, per_batch, seed=config.seed), steps)
    if not variant.aligned:
        return main
    if rows.alignment is None:
        raise PlanError("safegrad needs alignment rows: name data sets that should stay as they are, --elsewhere.")
    sampler = MixedSampler(rows.alignment, config.plain_rows, seed=config.seed)
    return OrderedStreams({None: main, "alignment": OrderedRows(rows.alignment, sampler, steps)})
