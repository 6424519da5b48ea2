"""Rows of a supervised run with a quarantine: retain and forget text, flags, pairs, legitimate text close to it."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery import data
from gradsurgery.data import Rows
from gradsurgery.data.documents import Document
from gradsurgery.data.split import Split
from gradsurgery.errors import DataError
from gradsurgery.runs import lifting, setup
from gradsurgery.runs.opposed import OpposedConfig
from gradsurgery.runs.quarantine_controls import Pair, placebo_of, shuffled
from gradsurgery.runs.quarantine_sft import QuarantineSftConfig, TextConfig

Corpus = Mapping[str, Split]


@dataclass(frozen=True, eq=False)
class FlaggedRows(Rows):
    """Rows with the columns ``flag``, what the detector says, and ``shuffled_flag``, as many flags dealt at random."""

    dealt: Tensor

    @property
    def flag(self) -> Tensor:
        """The detector's column."""
        return self.forget

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        flags = {"flag": row.pop("forget"), "shuffled_flag": self.dealt[index]}
        row.pop("retain")
        return {**row, **flags}


@dataclass
class SftData:
    """What a run is trained and measured on.

    Attributes:
        tokenizer: Of all models.
        rows: Flagged training sequences of the kinds retain, forget and perhaps adjacent.
        base: Training sequences of the model that is trained first: all but the forget ones.
        held_back: Sequences of ``forget``, ``retain`` and ``near``, what is legitimate but close to forget.
        pairs: Forget and retain rows side by side.
        placebo: Retain rows side by side.
    """

    tokenizer: Any
    rows: FlaggedRows
    base: Rows
    held_back: dict[str, Tensor]
    pairs: list[Pair]
    placebo: list[Pair]

    def training(self, kind: str, most: int) -> Tensor:
        """Training sequences of a kind, at most so many, spread evenly."""
        members = self.rows.of(kind)
        return self.rows.input_ids[members[:: max(len(members) // most, 1)][:most]]


def load_data(config: QuarantineSftConfig) -> SftData:
    """Read, split, tokenise, flag and pack the text.

    Raises:
        DataError: no such data or category, or too little of it.
    """
    text = config.text
    corpus = bilingual(text) if text.kind == "bilingual" else topics(text)
    kind = text.tokenizer if text.kind == "bilingual" or text.tokenizer != "embedded" else "train:2048"
    if config.model is None:
        tokenizer = setup.build_tokenizer(kind, corpus)
    else:
        tokenizer = lifting.load_tokenizer(OpposedConfig(model=config.model))
    trained = {name: part for name, part in corpus.items() if name != "near"}
    tokens = data.tokenize(trained, tokenizer)
    shape = {"context": text.context, "end_of_text": tokenizer.eos_token_id}
    near = ["adjacent"] if "adjacent" in trained else []
    rows = data.build_rows(
        tokens, **shape, forget="forget", adjacent=near, noise=config.labels.noise(), seed=config.seed
    )
    flagged = FlaggedRows(
        rows.input_ids, rows.category, rows.forget, rows.retain, rows.categories, shuffled(rows.forget, config.seed)
    )
    legitimate = {name: part for name, part in trained.items() if name != "forget"}
    held = setup.held_back(corpus, tokenizer, text.context, text.test_rows)
    held["near"] = held.pop("adjacent", held.get("near", torch.empty(0)))
    pairs = pairs_of(trained, rows, tokenizer, config.score.pairs)
    return SftData(
        tokenizer,
        flagged,
        setup.plain_rows(legitimate, tokenizer, text.context, config.seed),
        {name: held[name] for name in ("forget", "retain", "near")},
        pairs,
        placebo_of([wanted for _, wanted in pairs], config.seed),
    )


def bilingual(text: TextConfig) -> dict[str, Split]:
    """``retain``, ``forget``, and ``near``: held-back retain sentences with the most words of the forget language."""
    corpus = data.without_repeats(data.load_bilingual(text.source, validation=text.validation, limit=text.limit))
    for name in (text.retain, *text.forgets):
        if name not in corpus:
            raise DataError(f"there is no category {name!r} in this corpus; it has {', '.join(corpus)}.")
    parts = [corpus[name] for name in text.forgets]
    forget = Split([d for part in parts for d in part.train], [d for part in parts for d in part.validation])
    retain = corpus[text.retain]
    return {"retain": retain, "forget": forget, "near": Split([], nearest(retain, forget, text.near))}


def topics(text: TextConfig) -> dict[str, Split]:
    """``forget``, ``retain`` and ``adjacent`` topics."""
    corpus = data.load_topics(text.source, validation=text.validation, limit=text.limit)
    found = data.without_repeats(data.group_topics(corpus, text.forgets, text.adjacent))
    if "adjacent" not in found:
        raise DataError("what is legitimate but close to the forget topics has to be named: text.adjacent.")
    return found


def nearest(retain: Split, forget: Split, share: float, often: int = 5) -> list[Document]:
    """Of the held-back retain documents, the sentences that look most like the forget language.

    Names and words that both languages write alike (doctor, animal, hospital) in words of four letters and more, by
    their share of the sentence's letters; those sentences together are legitimate text that a detector of the forget
    language mistakes first.

    Args:
        retain: Documents of the language that stays.
        forget: Documents of the other.
        share: Of the sentences that are taken, those of three words and less aside.
        often: How often the forget language has to have a word in its training part.
    """
    counts = Counter(word for document in forget.train for word in _words(document.text))
    scored = []
    for document in retain.validation:
        for place, sentence in enumerate(re.split(r"(?<=[.!?;])\s+", document.text)):
            words = _words(sentence)
            if len(words) > 3:
                alike = sum(len(word) for word in words if len(word) > 3 and counts[word] >= often)
                scored.append((alike / sum(map(len, words)), document.id, place, sentence))
    if not 0 < share <= 1:
        raise DataError(f"text.near={share} is no share of the sentences: give a number above 0, up to 1.")
    scored.sort(key=lambda line: (-line[0], line[1], line[2]))
    chosen = sorted(scored[: max(round(share * len(scored)), 1)], key=lambda line: (line[1], line[2]))
    by_document: dict[str, list[str]] = {}
    for _, name, _, sentence in chosen:
        by_document.setdefault(name, []).append(sentence)
    return [Document(name, " ".join(sentences)) for name, sentences in by_document.items()]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def pairs_of(corpus: Corpus, rows: Rows, tokenizer: Any, count: int) -> list[Pair]:
    """Forget and retain text side by side: beginnings of documents that are translations of each other, or any rows.

    Raises:
        DataError: there is not enough text for two pairs.
    """
    retained = {document.id: document for document in corpus["retain"].train}
    aligned = [(d, retained[d.id]) for d in corpus["forget"].train if d.id in retained]
    if aligned:
        sides = _spread(aligned, 2 * count)
        texts = ([tokenizer(d.text, add_special_tokens=False)["input_ids"] for d in pair] for pair in sides)
        long = (pair for pair in texts if min(map(len, pair)) >= rows.context)
        found: Iterable[Any] = ([ids[: rows.context] for ids in pair] for pair in long)
    else:
        found = zip(*(rows.input_ids[rows.of(kind)].tolist() for kind in ("forget", "retain")), strict=False)
    pairs: list[Pair] = [(_row(unwanted), _row(wanted)) for unwanted, wanted in itertools.islice(found, count)]
    if len(pairs) < 2:
        raise DataError(f"there is no text for two pairs of {rows.context} tokens: choose a smaller text.context.")
    return pairs


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """All of them, so many that are spread evenly first."""
    every = max(len(items) // count, 1)
    return [items[k] for k in sorted(range(len(items)), key=lambda k: (k % every > 0, k))]


def _row(ids: Sequence[int]) -> dict[str, Tensor]:
    row = torch.tensor([ids])
    return {"input_ids": row, "labels": row}
