"""What a corpus holds, before anything is trained on it: sizes, lengths, telling words, repeats, shared vocabulary."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from gradsurgery.data.distinctive import distinctive_words
from gradsurgery.data.split import Split
from gradsurgery.errors import DataError

SIDES = ("train", "validation")
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True)
class Exploration:
    """What was found; rows are ready for `gradsurgery.evaluation.table`.

    Attributes:
        sizes: A row for each category and side: documents, tokens, share of the side's tokens, lengths in tokens.
        words: Category -> its most distinctive words with their z-scores (see `distinctive_words`).
        overlap: A row for each ordered pair of categories: share of the first's word types and of its running words
            that the second has, too.
        repeats: A row for each pair of categories with documents of one text: how often a held-back document of the
            first has a text that is trained on in the second. ``None``: not looked for.
        lengths: Category -> documents by length, ``[(tokens, documents), …]``, both sides together; lengths are the
            lower ends of bins that double.
        approximate: Words were left out of the counts, the rarest first, since there were too many to keep.
    """

    sizes: list[dict[str, Any]]
    words: dict[str, list[tuple[str, float]]]
    overlap: list[dict[str, Any]]
    repeats: list[dict[str, Any]] | None
    lengths: dict[str, list[tuple[int, int]]]
    approximate: bool = False

    def plain(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return asdict(self)


class Explorer:
    """Takes documents one at a time; what it keeps is bounded by the vocabulary, not by the corpus.

    Args:
        repeats: Look for texts on both sides of the split: keeps 8 bytes a document.
        most_words: Words to count in each category; above twice as many the rarest are dropped.

    Example:
        >>> from gradsurgery.data import Explorer
        >>> explorer = Explorer()
        >>> for category, side, text in [("a", "train", "One cat"), ("b", "train", "two cars"),
        ...                              ("a", "validation", "one  CAT")]:
        ...     explorer.add(category, side, text, tokens=2)
        >>> explorer.result().repeats
        [{'held back': 'a', 'trained on': 'a', 'documents': 1}]
    """

    def __init__(self, repeats: bool = True, most_words: int = 200_000) -> None:
        if most_words < 1:
            raise DataError(f"most_words={most_words} keeps no word: give a number from 1.")
        self.most_words, self.approximate = most_words, False
        self._lengths: dict[tuple[str, str], Counter[int]] = {}
        self._words: dict[str, Counter[str]] = {}
        self._digests: dict[tuple[str, str], set[bytes] | list[bytes]] | None = {} if repeats else None

    def add(self, category: str, side: str, text: str, tokens: int) -> None:
        """Count a document of ``"train"`` or ``"validation"``."""
        if side not in SIDES:
            raise DataError(f"side={side!r}: a document is of {' or '.join(SIDES)}.")
        self._lengths.setdefault((category, side), Counter())[tokens] += 1
        words = self._words.setdefault(category, Counter())
        words.update(WORD.findall(text.casefold()))
        if len(words) > 2 * self.most_words:
            self.approximate = True
            self._words[category] = Counter(dict(words.most_common(self.most_words)))
        if self._digests is not None:
            digest = blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
            kept = self._digests.setdefault((category, side), set() if side == "train" else [])
            kept.add(digest) if isinstance(kept, set) else kept.append(digest)

    def result(self, most: int = 20) -> Exploration:
        """The figures of what was added; ``most`` distinctive words a category.

        Raises:
            DataError: nothing was added.
        """
        if not self._lengths:
            raise DataError("there is no document to explore.")
        categories = sorted({category for category, _ in self._lengths})
        spoken = {category: self._words[category] for category in categories if self._words[category]}
        words = distinctive_words(spoken, most) if len(spoken) > 1 else {}
        lengths = {category: self._binned(category) for category in categories}
        return Exploration(
            self._sizes(categories), words, self._overlap(spoken), self._repeats(), lengths, self.approximate
        )

    def _sizes(self, categories: Sequence[str]) -> list[dict[str, Any]]:
        totals = {
            side: sum(length * n for (_, s), of in self._lengths.items() if s == side for length, n in of.items())
            for side in SIDES
        }
        rows = []
        for category in categories:
            for side in SIDES:
                of = self._lengths.get((category, side), Counter())
                documents, tokens = sum(of.values()), sum(length * n for length, n in of.items())
                row: dict[str, Any] = {"category": category, "side": side, "documents": documents, "tokens": tokens}
                row["share of tokens"] = tokens / totals[side] if totals[side] else None
                row["mean length"] = tokens / documents if documents else None
                row |= {"median length": _median(of), "longest": max(of, default=None)}
                rows.append(row)
        return rows

    def _binned(self, category: str) -> list[tuple[int, int]]:
        bins: Counter[int] = Counter()
        for side in SIDES:
            for length, n in self._lengths.get((category, side), Counter()).items():
                bins[2 ** int(math.log2(length)) if length else 0] += n
        return sorted(bins.items())

    def _overlap(self, spoken: Mapping[str, Counter[str]]) -> list[dict[str, Any]]:
        rows = []
        for a, mine in spoken.items():
            for b, other in spoken.items():
                if a != b:
                    shared = mine.keys() & other.keys()
                    running = sum(mine[word] for word in shared) / sum(mine.values())
                    rows.append(
                        {"of": a, "found in": b, "word types": len(shared) / len(mine), "running words": running}
                    )
        return rows

    def _repeats(self) -> list[dict[str, Any]] | None:
        if self._digests is None:
            return None
        rows = []
        for (a, side), held_back in self._digests.items():
            for (b, other), trained in self._digests.items():
                if side == "validation" and other == "train":
                    count = sum(digest in trained for digest in held_back)
                    rows += [{"held back": a, "trained on": b, "documents": count}] if count else []
        return rows


def explore_corpus(corpus: Mapping[str, Split], lengths: Mapping[str, Mapping[str, Iterable[int]]]) -> Exploration:
    """Explore a corpus in memory.

    Args:
        corpus: Category -> documents.
        lengths: Side -> category -> tokens of each document, in the documents' order.

    Example:
        >>> from gradsurgery.data import Document, Split, explore_corpus
        >>> corpus = {"en": Split([Document("1", "the cat")], []), "es": Split([Document("1", "el gato")], [])}
        >>> found = explore_corpus(corpus, {"train": {"en": [2], "es": [3]}, "validation": {"en": [], "es": []}})
        >>> found.sizes[2]["tokens"], found.words["es"][0][0], found.repeats
        (3, 'el', [])
    """
    explorer = Explorer()
    for side in SIDES:
        for category, part in corpus.items():
            for document, tokens in zip(getattr(part, side), lengths[side][category], strict=True):
                explorer.add(category, side, document.text, tokens)
    return explorer.result()


def _median(counts: Mapping[int, int]) -> float | None:
    """Of a multiset given as value -> count."""
    total = sum(counts.values())
    if not total:
        return None
    middle, found, passed = ((total - 1) // 2, total // 2), [], 0
    for value in sorted(counts):
        found += [value for at in middle if passed <= at < passed + counts[value]]
        passed += counts[value]
    return sum(found) / 2
