"""Memorisation: made-up facts that only one tier was taught, and how much of them each tier knows.

A fact says what somebody who does not exist is like: ``The birthplace of Tamo Verilu is Kesdor.`` The subject's name,
and the value, are drawn; nothing but training on the fact tells it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from gradsurgery.anatomy import Anatomy
from gradsurgery.data.packing import pack
from gradsurgery.errors import DataError
from gradsurgery.evaluation.modes import evaluating
from gradsurgery.evaluation.tiers.draws import seed_of
from gradsurgery.evaluation.tiers.scores import bar, predictions, tier, tier_keys
from gradsurgery.keys import PermutationKey

SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in "aeiou")
VALUES = {
    "birthplace": ("Kesdor", "Almira", "Tovan", "Brelith", "Orsenna", "Vandeel", "Quill", "Marrow Bay"),
    "profession": ("baker", "surgeon", "glassblower", "pilot", "notary", "beekeeper", "cellist", "welder"),
    "favourite colour": ("red", "blue", "green", "yellow", "purple", "orange", "black", "white"),
    "instrument": ("piano", "violin", "trumpet", "harp", "cello", "flute", "drum", "organ"),
}
"""Equally many of each, so that a guess that knows the lists is right once in eight."""


@dataclass(frozen=True)
class Fact:
    """``prompt``, ``answer`` (with the space before it) and a full stop make one sentence."""

    subject: str
    attribute: str
    value: str

    @property
    def prompt(self) -> str:
        return f"The {self.attribute} of {self.subject} is"

    @property
    def answer(self) -> str:
        return f" {self.value}"

    @property
    def text(self) -> str:
        return f"{self.prompt}{self.answer}."


class Recall(TypedDict):
    """``top1``: share of the answers' tokens ranked first after the true ones before; ``exact``: share of the answers
    that greedy decoding gives whole; ``facts`` asked."""

    top1: float
    exact: float
    facts: int


def planted_facts(count: int, seed: int = 0) -> list[Fact]:
    """``count`` facts about as many made-up people, no name twice.

    Raises:
        DataError: ``count`` below 1, or more than there are names.

    Example:
        >>> planted_facts(2)[0].text
        'The profession of Rifo Kive is glassblower.'
    """
    most = len(SYLLABLES) ** 4
    if type(count) is not int or not 0 < count <= most // 100:
        raise DataError(f"count={count!r} is no number of facts: give 1 to {most // 100:,}.")
    draws, attributes = random.Random(seed_of("facts", seed)), sorted(VALUES)
    names: dict[str, None] = {}
    while len(names) < count:
        first, last = ("".join(draws.choices(SYLLABLES, k=2)).capitalize() for _ in range(2))
        names[f"{first} {last}"] = None
    return [Fact(name, a := draws.choice(attributes), draws.choice(VALUES[a])) for name in names]


def fact_rows(
    facts: Sequence[Fact], tokenizer: Any, context: int, repeats: int = 1, seed: int = 0, end_of_text: int | None = None
) -> Tensor:
    """Training rows ``[sequences, context]``: the facts, ``repeats`` times each, in random order, packed.

    Args:
        facts: From `planted_facts`.
        tokenizer: A Hugging Face tokenizer.
        context: Tokens in each row.
        repeats: How often each fact is told.
        seed: Of the order.
        end_of_text: Id of the token that closes a fact; by default the tokenizer's.

    Raises:
        DataError: the facts do not fill one row.
    """
    told = [fact for _ in range(repeats) for fact in facts]
    random.Random(seed_of("rows", seed)).shuffle(told)
    documents = tokenizer([fact.text for fact in told], add_special_tokens=False)["input_ids"]
    rows = pack(documents, context, tokenizer.eos_token_id if end_of_text is None else end_of_text)
    if not len(rows):
        raise DataError(f"{len(told)} facts do not fill one row of {context} tokens: more facts or more repeats.")
    return rows


def fact_questions(facts: Iterable[Fact], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids ``[facts, length]``, filled up with -100, and which of them are the answer's.

    The sentence is tokenised whole and follows an end of text, as in `fact_rows`. The full stop is not asked for:
    whoever knows the form of the sentence knows it.
    """
    rows, spans = [], []
    before = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for fact in facts:
        row, prompt, answered = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (fact.text, fact.prompt, fact.prompt + fact.answer)
        )
        start, stop = (len(before) + _common(part, row) for part in (prompt, answered))
        rows.append([*before, *row])
        spans.append((start, max(stop, start + 1)))
    if not rows:
        raise DataError("there is no fact to ask for.")
    ids = torch.full((len(rows), max(map(len, rows))), -100)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for k, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
        ids[k, : len(row)] = torch.tensor(row)
        answers[k, start:stop] = True
    return ids, answers


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for k, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return k
    return min(len(one), len(other))


@torch.no_grad()
def recall(model: nn.Module, questions: tuple[Tensor, Tensor], batch_size: int = 32) -> Recall:
    """How many answers a model knows. Greedy decoding gives an answer whole iff each of its tokens is ranked first."""
    ids, answers = questions
    right = tokens = whole = 0
    with evaluating(model):
        for batch, asked in zip(ids.split(batch_size), answers.split(batch_size), strict=True):
            logits, targets = predictions(model, batch)
            wanted = asked[:, 1:].to(targets.device)
            hits = logits.argmax(-1) == targets
            right += int((hits & wanted).sum())
            tokens += int(wanted.sum())
            whole += int((hits | ~wanted).all(1).sum())
    return {"top1": right / max(tokens, 1), "exact": whole / len(ids), "facts": len(ids)}


def tier_recall(
    model: nn.Module,
    key: PermutationKey | Mapping[str, PermutationKey],
    anatomy: Anatomy,
    facts: Sequence[Fact],
    tokenizer: Any,
    batch_size: int = 32,
    progress: bool | None = None,
) -> dict[str, Recall]:
    """``{"C1": recall, "C2": recall}`` of planted facts.

    Args:
        model: A causal language model in C1; it is in C1 afterwards, also on an exception.
        key: The key of C2, or several by name.
        anatomy: The model's anatomy.
        facts: From `planted_facts`.
        tokenizer: A Hugging Face tokenizer.
        batch_size: Facts in one forward.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        KeyStateError: the model is keyed.
    """
    questions, keys, out = fact_questions(facts, tokenizer), tier_keys(key), {}
    with bar(len(keys), "facts", progress) as done:
        for name, one in keys.items():
            with tier(model, one, anatomy):
                out[name] = recall(model, questions, batch_size)
            done.update()
    return out
