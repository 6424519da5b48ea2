"""What every recipe sets up alike: tokenizer, model, packed sequences, the name of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from gradsurgery.data import Rows, load_tokenizer, pack, tokenize, train_tokenizer
from gradsurgery.data.split import Split
from gradsurgery.errors import DataError


@dataclass
class ModelConfig:
    """Any causal language model of transformers, built from its config.

    Args:
        type: Model type as in ``AutoConfig``.
        options: Its configuration; vocabulary and special tokens come from the tokenizer.
        context: Tokens of a sequence.
    """

    type: str = "gpt_neo"
    options: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 512,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 64,
        }
    )
    context: int = 128


def build_model(config: ModelConfig, tokenizer: Any, seed: int) -> PreTrainedModel:
    """A model with fresh weights, the same for every method of one seed."""
    set_seed(seed)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {"max_position_embeddings": config.context, **config.options}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.type, vocab_size=len(tokenizer), **special, **options)
    )


def build_tokenizer(kind: str, corpus: Mapping[str, Split]) -> Any:
    """``"embedded"``, ``"train:SIZE"`` (on the training part), or a name or folder for ``AutoTokenizer``."""
    if kind == "embedded":
        return load_tokenizer()
    if kind.startswith("train:"):
        size = kind.removeprefix("train:")
        if not size.isdecimal():
            raise DataError(f"tokenizer={kind!r}: train: is followed by the number of entries, as in train:4096.")
        return train_tokenizer((document.text for part in corpus.values() for document in part.train), int(size))
    return AutoTokenizer.from_pretrained(kind)


def choose(corpus: Mapping[str, Split], names: Iterable[str]) -> dict[str, Split]:
    """Categories by name; ``"es:bible"`` is the documents of ``es`` whose id begins with ``bible``.

    Raises:
        DataError: there is no such category, or no document of it left.
    """
    out: dict[str, Split] = {}
    for name in names:
        category, _, prefix = name.partition(":")
        if category not in corpus:
            raise DataError(f"there is no category {category!r} in this corpus; it has {', '.join(corpus)}.")
        parts = ([d for d in part if d.id.startswith(prefix)] for part in vars_of(corpus[category]))
        out[name] = Split(*parts)
        if not out[name].train:
            raise DataError(f"{name!r}: no document of {category!r} has an id that begins with {prefix!r}.")
    return out


def vars_of(part: Split) -> tuple[list[Any], list[Any]]:
    return part.train, part.validation


def plain_rows(corpus: Mapping[str, Split], tokenizer: Any, context: int, seed: int) -> Rows:
    """Unlabelled rows of every category: its documents shuffled, then packed to full sequences."""
    parts, rng = [], random.Random(seed)
    for name, documents in tokenize(corpus, tokenizer).items():
        sequences = pack(rng.sample(documents, len(documents)), context, tokenizer.eos_token_id)
        if not len(sequences):
            raise DataError(f"the {len(documents)} documents of {name} do not fill one sequence of {context} tokens.")
        parts.append(Rows.uniform(sequences, name, forget=False, retain=False, categories=tuple(corpus)))
    return Rows.cat(parts)


def held_back(corpus: Mapping[str, Split], tokenizer: Any, context: int, rows: int) -> dict[str, Tensor]:
    """Sequences of each category's validation part, at most ``rows``, spread evenly over its documents."""
    out = {}
    for name, documents in tokenize(corpus, tokenizer, "validation").items():
        sequences = pack(documents, context, tokenizer.eos_token_id)
        if not len(sequences):
            raise DataError(f"the {len(documents)} held-back documents of {name} do not fill one sequence.")
        every = max(1, len(sequences) // rows)
        out[name] = sequences[::every][:rows]
    return out


def deciding(config: Any, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """The part of a recipe's configuration that decides its results, as plain data."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "name", "overwrite", *leave_out)}


def digest(*parts: Any) -> str:
    """8 hex digits of plain data, for names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
