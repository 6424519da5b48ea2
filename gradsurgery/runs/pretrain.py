"""What the pretraining recipes share: text of some categories, a model, rows in order, a stock checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gradsurgery.data import MixedSampler, Rows, load_bilingual
from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.setup import ModelConfig, build_model, build_tokenizer, choose, held_back, plain_rows
from gradsurgery.runs.steps import OrderedRows


@dataclass
class TextConfig:
    """How the text is read.

    Args:
        tokenizer: "embedded" (made of English and Spanish), "train:SIZE" (on the training part of ``categories``), or
            a name or folder for AutoTokenizer.
        categories: What is trained on; "es:bible" takes the documents of es whose id begins with bible.
        evaluate: What is evaluated on; every category by default.
        validation: Share of the documents held back.
        limit: Documents a category, for a quick look.
        test_rows: Sequences a category in the final evaluation.
    """

    tokenizer: str = "train:2048"
    categories: list[str] = field(default_factory=lambda: ["en"])
    evaluate: list[str] | None = None
    validation: float = 0.05
    limit: int | None = None
    test_rows: int = 400


def small_model() -> ModelConfig:
    """A GPT-Neo that both tiers of an embedded run can be trained in within minutes on two cores."""
    options = {
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 8,
        "intermediate_size": 512,
        "attention_types": [[["global"], 4]],
    }
    return ModelConfig(options=options, context=64)


@dataclass
class PretrainConfig:
    """A pretraining run.

    Args:
        data: "embedded", "hub:owner/name", or a local file or folder.
        rows: Sequences of a batch; their mix follows the data.
        start_from: Stock checkpoint (folder or hub name) whose weights and tokenizer to start from.
        resume_from: Checkpoint of another pretraining script to go on from: weights, moments, schedule and step.
        out: Folder of all runs.
        name: Name of this run; by default made from its configuration, so that the same command resumes.
        overwrite: Delete a run of this name first. Keys stay.
    """

    data: str = "embedded"
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=small_model)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1200, learning_rate=4e-3, max_grad_norm=1.0))
    rows: int = 8
    start_from: str | None = None
    resume_from: str | None = None
    seed: int = 0
    out: str = "runs/pretrain"
    name: str | None = None
    overwrite: bool = False


@dataclass
class Loaded:
    """A tokenizer, training rows, and held-back sequences by category."""

    tokenizer: Any
    rows: Rows
    held_back: dict[str, Tensor]

    def steps(self, config: PretrainConfig) -> OrderedRows:
        return OrderedRows(self.rows, MixedSampler(self.rows, config.rows, seed=config.seed), config.train.steps)

    def sample(self, config: TrainConfig) -> dict[str, Tensor]:
        """What is evaluated on during training."""
        return {category: ids[: config.eval_rows] for category, ids in self.held_back.items()}


def load(config: PretrainConfig) -> Loaded:
    """Read, split, tokenise and pack the text.

    Raises:
        DataError: no such data or category.
    """
    text, context = config.text, config.model.context
    corpus = load_bilingual(config.data, validation=text.validation, limit=text.limit)
    if config.start_from is not None:
        tokenizer = AutoTokenizer.from_pretrained(config.start_from)
    else:
        tokenizer = build_tokenizer(text.tokenizer, choose(corpus, text.categories))
    rows = plain_rows(choose(corpus, text.categories), tokenizer, context, config.seed)
    wanted = choose(corpus, text.evaluate if text.evaluate is not None else corpus)
    return Loaded(tokenizer, rows, held_back(wanted, tokenizer, context, text.test_rows))


def starting_model(config: PretrainConfig, tokenizer: Any) -> PreTrainedModel:
    """A model with fresh weights, or those of a checkpoint; in fp32."""
    if config.start_from is not None:
        return AutoModelForCausalLM.from_pretrained(config.start_from, dtype=torch.float32)
    return build_model(config.model, tokenizer, config.seed)


def save(model: PreTrainedModel, tokenizer: Any, folder: RunFolder, name: str) -> None:
    """A stock checkpoint in ``models/``; a keyed model is refused."""
    with folder.whole_folder(f"models/{name}") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
