"""Remove a topic: SGTM on dictionary entries or Wikipedia, against filters, its own variants and unlearning.

Forget, adjacent and retain topics: by default living things (animals, plants, body) are removed from WordNet's glosses,
other natural science is adjacent (arXiv 2512.05648, section 5, small). ``--data FOLDER`` takes what
``recipes/prepare_wikipedia.py`` wrote, or texts of your own with a topic each.

    python recipes/sgtm_topics.py
    python recipes/sgtm_topics.py --seed 1 --labels.undiscovered 0.1 --models "[plain,strict_filter,sgtm,rmu]"
    python recipes/sgtm_topics.py --config recipes/configs/sgtm_topics/artifact.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradsurgery import data
from gradsurgery.data.topics import ADJACENT, FORGET
from gradsurgery.errors import DataError
from gradsurgery.runs import TrainConfig, build_tokenizer, ending_in_a_sentence
from gradsurgery.runs.exploration import exploration
from gradsurgery.runs.pretrain import small_model
from gradsurgery.runs.removal import ProtocolConfig, RemovalConfig, SgtmConfig, TextConfig
from gradsurgery.runs.removal_models import build_method, build_model
from gradsurgery.runs.removal_recipe import run_removal
from gradsurgery.runs.removal_run import RemovalData
from gradsurgery.runs.setup import ModelConfig

__all__ = ["Config", "build_method", "build_model", "load_data", "main"]

ROLES = ("forget", "adjacent", "retain")


def topics() -> TextConfig:
    return TextConfig(tokenizer="train:2048", forget=list(FORGET), adjacent=list(ADJACENT))


@dataclass
class Config(RemovalConfig):
    __doc__ = RemovalConfig.__doc__  # which the command line's help is made of

    text: TextConfig = field(default_factory=topics)
    model: ModelConfig = field(default_factory=small_model)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1200, eval_every=150))
    sgtm: SgtmConfig = field(default_factory=lambda: SgtmConfig(heads=1, neurons=128))
    protocols: ProtocolConfig = field(default_factory=lambda: ProtocolConfig(trade_off=True))
    rows: dict[str, int] | int = field(default_factory=lambda: {"forget": 4, "adjacent": 2, "retain": 6})
    models: list[str] = field(default_factory=lambda: ["plain", "data_filter", "strict_filter", "sgtm"])
    out: str = "runs/sgtm_topics"


def load_data(config: Config) -> RemovalData:
    """Tokenizer, labelled training rows, held-back sequences by category."""
    text, labels = config.text, config.labels
    shares: dict[str, Any] = {"retain_retain": labels.retain, "adjacent_retain": labels.adjacent, "seed": config.seed}
    forget = [text.forget] if isinstance(text.forget, str) else text.forget
    if (Path(config.data) / "manifest.json").is_file():
        articles = data.load_articles(config.data)
        tokenizer = build_tokenizer(text.tokenizer, {})
        require_fit(articles.about, config, tokenizer)
        rows = articles.rows(labels.noise(), **shares)
        roles = {role: list(articles.of_role(role)) for role in ROLES}
        return RemovalData.of(tokenizer, rows, articles.held_back(2 * text.test_rows), roles, config)
    corpus = data.load_topics(config.data, validation=text.validation, limit=text.limit)
    corpus = data.without_repeats(data.group_topics(corpus, forget, text.adjacent))
    tokenizer = build_tokenizer(text.tokenizer, corpus)
    shape = {"context": config.model.context, "end_of_text": tokenizer.eos_token_id}
    tokens = {"train": data.tokenize(corpus, tokenizer), "validation": data.tokenize(corpus, tokenizer, "validation")}
    near = ["adjacent"] if "adjacent" in corpus else []
    rows = data.build_rows(tokens["train"], **shape, forget="forget", adjacent=near, noise=labels.noise(), **shares)
    held_back = data.pack_categories(tokens["validation"], **shape)
    roles = {role: [role] if role in corpus else [] for role in ROLES}
    return RemovalData.of(tokenizer, rows, held_back, roles, config, exploration(corpus, tokens))


def require_fit(about: dict[str, Any], config: Config, tokenizer: Any) -> None:
    """Prepared articles speak of one context length and one tokenizer."""
    for name, wanted in (("context", config.model.context), ("end_of_text", tokenizer.eos_token_id)):
        if about[name] != wanted:
            raise DataError(
                f"{config.data} was prepared with {name}={about[name]}, this run has {wanted}: set model.context and "
                f"text.tokenizer to what it was prepared with, or prepare it again."
            )


def main(config: Config) -> None:
    run_removal(config, load_data, "Removing a topic with selective gradient masking")


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        main(jsonargparse.auto_cli(Config, as_positional=False))
