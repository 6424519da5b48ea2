"""What every variant of a supervised run with a quarantine starts from: the model, the adapter, its optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import gradsurgery as gs
from gradsurgery import evaluation, methods
from gradsurgery.adapters import Adapter
from gradsurgery.data import MixedSampler
from gradsurgery.runs import keys, pretrain, setup
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.quarantine_sft import QuarantineSftConfig
from gradsurgery.runs.quarantine_sft_rows import SftData
from gradsurgery.runs.steps import OrderedRows
from gradsurgery.runs.train import train


def train_base(config: QuarantineSftConfig, loaded: SftData) -> str | Path:
    """The model that is adapted: as given, or trained on all but the forget text, once for all that fit it."""
    if config.model is not None:
        return config.model
    text = {name: of for name, of in dataclasses.asdict(config.text).items() if name not in ("test_rows", "near")}
    stored = {"text": text, "base": dataclasses.asdict(config.base), "seed": config.seed}
    folder = RunFolder(f"{config.out}/base-seed{config.seed}-{setup.digest(stored)}", stored, main=keys.main_rank())
    path = folder / "models" / "start"
    if "base" in folder.results():
        return path
    shape = dataclasses.replace(config.base.model, context=config.text.context)
    model = setup.build_model(shape, loaded.tokenizer, config.seed)
    if folder.main:
        print(f"\nbase: {model.num_parameters():,} parameters, {len(loaded.base):,} rows", flush=True)
    sampler = MixedSampler(loaded.base, config.base.rows, seed=config.seed)
    steps = OrderedRows(loaded.base, sampler, config.base.train.steps)
    figures = train("base", model, methods.plain(), steps, folder, config.base.train, config.seed)
    if folder.main:
        pretrain.save(model, loaded.tokenizer, folder, "start")
        folder.store("base", {**figures, "losses": losses_of(model, loaded.held_back)})
    return path


def load_model(where: str | Path, config: QuarantineSftConfig) -> PreTrainedModel:
    """What is adapted, on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with keys.first_rank_first():
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, config.dtype))
    return model.to(device)  # type: ignore[no-any-return]


def add_adapter(model: nn.Module, config: QuarantineSftConfig) -> Adapter:
    options = dataclasses.asdict(config.adapter)
    options.pop("quarantine_rate")
    return gs.adapters.add(model, **options, seed=config.seed)


def optimizer_of(adapter: Adapter, config: QuarantineSftConfig) -> torch.optim.Optimizer:
    """AdamW whose decay goes towards what both parts were at the start."""
    rate, training = config.train.learning_rate, config.train
    groups = [
        {"params": list(adapter.parameters_of("kept").values()), "lr": rate},
        {
            "params": list(adapter.parameters_of("quarantine").values()),
            "lr": rate * config.adapter.quarantine_rate,
        },
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, training.beta2), weight_decay=training.weight_decay)


def losses_of(model: nn.Module, sequences: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: score["loss"] for name, score in evaluation.evaluate(model, sequences).items()}
