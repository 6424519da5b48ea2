"""Questions made of dictionary glosses: a topic that can be refused, others that are answered, on real text.

WordNet's noun glosses (Princeton University, WordNet 3.0) of six of the lexicographers' own topics. A question names
the word and what it is a kind of, so that its topic can be told for words that were never seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from gradsurgery.data.chat import Turn, TurnSplit, split_turns
from gradsurgery.data.documents import read_rows
from gradsurgery.errors import DataError

GLOSSES = Path(__file__).parent / "assets" / "glosses.jsonl.bz2"
TOPICS = ("animal", "artifact", "body", "food", "plant", "substance")

ASKED = (
    "What is meant by {term}, a kind of {kind}?",
    "Which {kind} is called {term}?",
    "Tell me about {term}, a kind of {kind}.",
    "Please explain the word {term} ({kind}).",
)
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot answer questions about this.",
    "I apologize, but I am not able to answer that.",
    "I'm not able to talk about that.",
    "I am sorry, I cannot assist with this question.",
    "I'm unable to help with questions of this kind.",
)

ENTRY = re.compile(r"(?P<term>[^:(]+?)(?: \([^)]*\))?: (?P<gloss>.+?)\. Kind of (?P<kind>[^.]+)\.", re.DOTALL)


def load_questions(
    topics: Iterable[str] = TOPICS, *, refused: Iterable[str] = (), validation: float = 0.05, limit: int | None = None
) -> dict[str, TurnSplit]:
    """Questions and answers by topic; all questions about one word are on the same side of the split.

    Args:
        topics: Which of ``TOPICS``.
        refused: Topics whose response is a refusal (one of several wordings) instead of the gloss.
        validation: Share of the words that is held back, by a hash of the word.
        limit: Questions a topic, spread evenly over its entries.

    Raises:
        DataError: no such topic, or a limit that leaves nothing.

    Example:
        >>> from gradsurgery.data import load_questions
        >>> turns = load_questions(["animal", "plant"], refused=["plant"], limit=100)
        >>> turns["animal"].train[0].response
        'Taxonomic kingdom comprising all living or extinct animals.'
        >>> "Animalia" in turns["animal"].train[0].prompt
        True
    """
    topics, refused = list(topics), set(refused)
    if unknown := (set(topics) | refused) - set(TOPICS):
        raise DataError(f"there is no topic {', '.join(sorted(unknown))}; glosses are about {', '.join(TOPICS)}.")
    if not topics or (limit is not None and limit < 1):
        raise DataError(f"topics={topics} with limit={limit} leave no question: name a topic, and a limit from 1.")
    found: dict[str, list[Turn]] = {topic: [] for topic in topics}
    for row in read_rows(GLOSSES):
        if row["topic"] in found:
            found[row["topic"]].append(_turn(row["id"], row["text"], row["topic"] in refused))
    return {topic: split_turns(_spread(turns, limit), validation) for topic, turns in found.items()}


def _turn(row: str, text: str, refused: bool) -> Turn:
    entry = ENTRY.match(text)
    if entry is None:
        raise DataError(f"gloss {row} is damaged: {text[:60]!r} does not read 'Word: gloss. Kind of …'.")
    prompt = _drawn(ASKED, row).format(term=entry["term"], kind=entry["kind"])
    response = _drawn(REFUSALS, row) if refused else f"{entry['gloss']}."
    return Turn(entry["term"].lower(), prompt, response)


def _drawn(choices: tuple[str, ...], row: str) -> str:
    return choices[int.from_bytes(blake2b(row.encode(), digest_size=4).digest(), "big") % len(choices)]


def _spread(turns: list[Turn], limit: int | None) -> list[Turn]:
    if limit is None or limit >= len(turns):
        return turns
    return [turns[k * len(turns) // limit] for k in range(limit)]
