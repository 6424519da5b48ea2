"""Topics to be removed: WordNet's glosses by the lexicographers' own topics, or texts of your own with a topic each.

The embedded entries are those of Princeton University's WordNet 3.0, 105,832 in 43 topics, written as "Word (synonyms):
gloss. Kind of hypernym." The experiment is the one of SGTM on Wikipedia (arXiv 2512.05648, section 5), small.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from gradsurgery.data.corpus import source_rows
from gradsurgery.data.documents import Document, read_rows
from gradsurgery.data.questions import GLOSSES
from gradsurgery.data.split import Split, split
from gradsurgery.errors import DataError

OTHERS = GLOSSES.with_name("topics.jsonl.bz2")
FORGET = ("animal", "plant", "body")
ADJACENT = ("substance", "food", "phenomenon", "process", "object", "verb.body")


def load_topics(
    source: str | Path = "embedded", *, validation: float = 0.05, limit: int | None = None
) -> dict[str, Split]:
    """Documents by topic.

    Args:
        source: ``"embedded"``, or a data set of the hub, a file or a folder as for `load_bilingual`, whose rows have
            ``text`` and ``topic`` (or ``category``; without either the file's name counts).
        validation: Share of the documents that is held back, by a hash of their id.
        limit: Documents a topic, spread evenly over its documents.

    Raises:
        DataError: nothing there, rows without text, a limit that leaves nothing.

    Example:
        >>> from gradsurgery.data import load_topics
        >>> topics = load_topics(limit=100)
        >>> topics["plant"].train[0].text
        'Plantae (kingdom Plantae, plant kingdom): (botany) the taxonomic kingdom comprising all living or extinct ...'
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} keeps no document: give a number from 1, or None.")
    found: dict[str, list[Document]] = {}
    for name, rows in _rows(source).items():
        for row in rows:
            topic = next((str(row[key]) for key in ("topic", "category") if row.get(key) is not None), name)
            if not isinstance(row.get("text"), str):
                have = ", ".join(row) or "nothing"
                raise DataError(f"{name}: row {row.get('id')} has no text; expected a column text, it has {have}.")
            if row["text"].strip():
                found.setdefault(topic, []).append(Document(str(row["id"]), row["text"]))
    if not found:
        raise DataError(f"{source} holds no document.")
    return {topic: split(_spread(found[topic], limit), validation) for topic in sorted(found)}


def group_topics(
    corpus: Mapping[str, Split], forget: Collection[str] = FORGET, adjacent: Collection[str] = ADJACENT
) -> dict[str, Split]:
    """The topics as ``{"forget": …, "adjacent": …, "retain": …}``; all that is not named is retain.

    Raises:
        DataError: an unknown topic (the message has the nearest), a topic on both lists, a group without documents.

    Example:
        >>> from gradsurgery.data import group_topics, load_topics
        >>> {name: len(part.train) + len(part.validation) for name, part in group_topics(load_topics()).items()}
        {'forget': 15658, 'adjacent': 8129, 'retain': 82045}
    """
    for name in (*forget, *adjacent):
        if name not in corpus:
            near = difflib.get_close_matches(name, corpus, n=3, cutoff=0.3) or list(corpus)[:5]
            raise DataError(f"there is no topic {name!r}; near ones: {', '.join(near)}.")
    if both := set(forget) & set(adjacent):
        raise DataError(f"topic {', '.join(sorted(both))} is both forget and adjacent.")
    groups = {
        "forget": list(forget),
        "adjacent": list(adjacent),
        "retain": [topic for topic in corpus if topic not in {*forget, *adjacent}],
    }
    out = {
        group: Split(*([d for topic in topics for d in part(corpus[topic])] for part in (_train, _validation)))
        for group, topics in groups.items()
        if topics or group != "adjacent"
    }
    for group, part in out.items():
        for side, documents in (("training", part.train), ("validation", part.validation)):
            if not documents:
                raise DataError(f"{group} ({', '.join(groups[group]) or 'no topic'}) has no {side} document.")
    return out


def without_repeats(corpus: Mapping[str, Split]) -> dict[str, Split]:
    """The corpus without held-back documents whose text is trained on too, in whatever category; warns of them.

    Texts are compared without case and spacing.

    Example:
        >>> from gradsurgery.data import Document, Split, without_repeats
        >>> corpus = {"a": Split([Document("1", "One  text")], [Document("2", "Another text")])}
        >>> without_repeats(corpus) == corpus
        True
    """
    trained = {_normal(d) for part in corpus.values() for d in part.train}
    out, repeated = {}, 0
    for category, part in corpus.items():
        kept = [d for d in part.validation if _normal(d) not in trained]
        repeated += len(part.validation) - len(kept)
        out[category] = Split(part.train, kept)
    if repeated:
        warnings.warn(
            f"{repeated} held-back documents are left out, since their text is trained on, too: losses on them would "
            f"measure memory.",
            stacklevel=2,
        )
    return out


def _rows(source: str | Path) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    if str(source) == "embedded":
        return {"": [*read_rows(GLOSSES), *read_rows(OTHERS)]}
    return source_rows(source)


def _spread(documents: list[Document], limit: int | None) -> list[Document]:
    if limit is None or limit >= len(documents):
        return documents
    return [documents[k * len(documents) // limit] for k in range(limit)]


def _normal(document: Document) -> int:
    return hash(" ".join(document.text.casefold().split()))


def _train(part: Split) -> list[Document]:
    return part.train


def _validation(part: Split) -> list[Document]:
    return part.validation
