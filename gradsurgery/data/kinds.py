"""A second task made of dictionary glosses: told what something is, name its kind."""

from __future__ import annotations

from collections.abc import Iterable

from gradsurgery.data.chat import Turn, TurnSplit, split_turns
from gradsurgery.data.documents import read_rows
from gradsurgery.data.questions import ENTRY, GLOSSES, TOPICS
from gradsurgery.errors import DataError

ASKED = "What kind of thing is this: {gloss}?"


def load_kinds(topics: Iterable[str], *, validation: float = 0.05, limit: int | None = None) -> dict[str, TurnSplit]:
    """Descriptions and the kind of what they describe, by topic; a word is on the same side as in `load_questions`.

    Args:
        topics: Which of ``gradsurgery.data.questions.TOPICS``.
        validation: Share of the words that is held back.
        limit: Descriptions a topic, spread evenly over its entries.

    Raises:
        DataError: no such topic, or a limit that leaves nothing.

    Example:
        >>> from gradsurgery.data import load_kinds
        >>> turn = load_kinds(["substance"])["substance"].train[2]
        >>> turn.prompt.startswith("What kind of thing is this: "), len(turn.response) > 0
        (True, True)
    """
    topics = list(topics)
    if unknown := set(topics) - set(TOPICS):
        raise DataError(f"there is no topic {', '.join(sorted(unknown))}; glosses are about {', '.join(TOPICS)}.")
    if not topics or (limit is not None and limit < 1):
        raise DataError(f"topics={topics} with limit={limit} leave no question: name a topic, and a limit from 1.")
    found: dict[str, list[Turn]] = {topic: [] for topic in topics}
    for row in read_rows(GLOSSES):
        entry = ENTRY.match(row["text"]) if row["topic"] in found else None
        if entry is not None:
            gloss = entry["gloss"][:1].lower() + entry["gloss"][1:]
            found[row["topic"]].append(Turn(entry["term"].lower(), ASKED.format(gloss=gloss), entry["kind"]))
    step = {topic: max(1, len(turns) // (limit or len(turns))) for topic, turns in found.items()}
    return {topic: split_turns(turns[:: step[topic]][:limit], validation) for topic, turns in found.items()}
