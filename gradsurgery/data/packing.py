"""Packing: tokenised documents, each closed by an end-of-text token, cut into sequences of full context length."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradsurgery.data.labels import label_rows
from gradsurgery.data.rows import Rows
from gradsurgery.data.split import Split
from gradsurgery.errors import DataError

Tokens = Mapping[str, Sequence[Sequence[int]]]


def tokenize(
    corpus: Mapping[str, Split], tokenizer: Any, part: Literal["train", "validation"] = "train"
) -> dict[str, list[list[int]]]:
    """Token ids of every document of one part, by category; no special tokens are added."""
    return {
        category: tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"] if documents else []
        for category, documents in ((c, getattr(s, part)) for c, s in corpus.items())
    }


def pack(documents: Iterable[Sequence[int]], context: int, end_of_text: int) -> Tensor:
    """``[sequences, context]`` (int32): document, end of text, document, …; the last incomplete sequence is dropped."""
    if context < 2:
        raise DataError(f"context={context} is too short: a sequence needs a token to predict from and one to predict.")
    stream = [token for document in documents for token in (*document, end_of_text)]
    whole = len(stream) // context
    return torch.tensor(stream[: whole * context], dtype=torch.int32).view(whole, context)


def pack_categories(tokens: Tokens, context: int, end_of_text: int) -> dict[str, Tensor]:
    """Packed sequences of each category, in the documents' order: what ``evaluation.evaluate`` reads."""
    packed = {category: pack(documents, context, end_of_text) for category, documents in tokens.items()}
    for category, sequences in packed.items():
        if not len(sequences):
            raise DataError(_too_short(len(tokens[category]), category, context))
    return packed


def build_rows(
    tokens: Tokens,
    *,
    context: int,
    end_of_text: int,
    forget: str | Sequence[str],
    unit: Literal["document", "sequence"] = "document",
    seed: int = 0,
    **labelling: Any,
) -> Rows:
    """Shuffle, label and pack tokenised documents.

    Args:
        tokens: Category -> documents as token ids (see ``tokenize``).
        context: Tokens in each sequence.
        end_of_text: Id of the token that closes a document.
        forget: Category or categories to be removed.
        unit: What a label is decided for. ``"document"``: documents of one category and the same labels are packed
            together, so that a sequence never holds text of another label. ``"sequence"``: documents are packed first.
        seed: Of the order and of the labels.
        labelling: Passed to ``label_rows``: ``adjacent``, ``noise``, ``retain_retain``, …
    """
    rng = random.Random(seed)
    categories = sorted(tokens)
    shuffled = {category: rng.sample(list(tokens[category]), len(tokens[category])) for category in categories}
    if unit == "sequence":
        packed = pack_categories(shuffled, context, end_of_text)
        names = [category for category in categories for _ in range(len(packed[category]))]
        labels = label_rows(names, forget=forget, seed=seed, **labelling)
        ids = torch.tensor([categories.index(name) for name in names])
        return Rows(
            torch.cat([packed[c] for c in categories]), ids, labels.forget, labels.retain, categories=tuple(categories)
        )
    if unit != "document":
        raise DataError(f"unit={unit!r} is unknown: labels are decided for each 'document' or for each 'sequence'.")

    names = [category for category in categories for _ in shuffled[category]]
    labels = label_rows(names, forget=forget, seed=seed, **labelling)
    flags = zip(labels.forget.tolist(), labels.retain.tolist(), strict=True)
    groups: dict[tuple[str, bool, bool], list[Sequence[int]]] = {}
    for name, flag, document in zip(names, flags, (d for c in categories for d in shuffled[c]), strict=True):
        groups.setdefault((name, *flag), []).append(document)
    parts = []
    for (name, is_forget, is_retain), documents in sorted(groups.items(), key=lambda item: item[0]):
        sequences = pack(documents, context, end_of_text)
        if not len(sequences):
            raise DataError(_too_short(len(documents), f"{name} (forget={is_forget}, retain={is_retain})", context))
        parts.append(Rows.uniform(sequences, name, is_forget, is_retain, tuple(categories)))
    return Rows.cat(parts)


def _too_short(documents: int, what: str, context: int) -> str:
    return (
        f"the {documents} documents of {what} do not fill one sequence of {context} tokens: give more text, a shorter "
        "context or unit='sequence'."
    )
