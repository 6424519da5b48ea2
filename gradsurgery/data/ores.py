"""ORES article topics: the best topic of every page of a wiki, in an index on disk whatever the size of the dump.

The dump is a CSV with a line for each page and topic, such as ``topicsForAllWikipediaPages2020-08-24.csv`` (ORES:
https://www.mediawiki.org/wiki/ORES/Articletopic). A page's topic is, as in SGTM (arXiv 2512.05648): topics without an
asterisk before those with one (which are topics of topics), then the highest score; ties by name.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gradsurgery.errors import DataError
from gradsurgery.files import atomic_path

COLUMNS = ("wikidata_id", "page_id", "title", "source", "topic", "score")
_NAMES = {
    "page_id": ("page_id", "pageid", "pid"),
    "source": ("source", "wiki_db", "wiki", "dbname"),
    "topic": ("topic", "predicted_topic"),
    "score": ("score", "probability", "prob"),
}
_BETTER = """
INSERT INTO pages VALUES (?, ?, ?, ?) ON CONFLICT(page) DO UPDATE
SET topic = excluded.topic, starred = excluded.starred, score = excluded.score
WHERE (excluded.starred, -excluded.score, excluded.topic) < (pages.starred, -pages.score, pages.topic)
"""


class TopicIndex:
    """Page id -> best topic, read from an SQLite file; made by `build`.

    Attributes:
        skipped: Lines of the dump that could not be read.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise DataError(f"{path} does not exist: make it with TopicIndex.build(dump, {str(path)!r}).")
        self._pages = sqlite3.connect(f"file:{Path(path)}?mode=ro", uri=True)
        try:
            self.skipped = int(self._pages.execute("SELECT skipped FROM about").fetchone()[0])
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path} is no topic index, or damaged ({error}).") from error

    @classmethod
    def build(
        cls, dump: str | Path, path: str | Path, *, wiki: str = "enwiki", columns: Sequence[str] | None = None
    ) -> TopicIndex:
        """Read a dump (``.csv``, also ``.gz`` or ``.bz2``) into an index; the memory it takes does not grow with it.

        Args:
            dump: The file.
            path: Where the index goes; it appears whole or not at all.
            wiki: Pages of this wiki alone count.
            columns: What the columns are, in their order: ``page_id``, ``topic``, ``score`` and perhaps ``source``,
                anything else by any name. Without it a header line says so, in whatever order, and without a header
                they are ``wikidata_id, page_id, title, source, topic, score``.

        Raises:
            DataError: no such file, not UTF-8, columns that do not fit, more than 1% of the lines unreadable, no page.
        """
        dump, path = Path(dump), Path(path)
        if not dump.is_file():
            raise DataError(
                f"{dump} is not a file: download the topics dump from "
                f"https://analytics.wikimedia.org/published/datasets/topics/ and give its path."
            )
        skipped, read = 0, 0
        with atomic_path(path) as beside:
            beside.unlink()
            pages = sqlite3.connect(beside)
            pages.execute("PRAGMA journal_mode = OFF")
            pages.execute("PRAGMA synchronous = OFF")
            pages.execute("CREATE TABLE pages (page INTEGER PRIMARY KEY, topic TEXT, starred INTEGER, score REAL)")
            lines = _entries(dump, wiki, columns)
            while chunk := list(islice(lines, 10_000)):
                good = [entry for entry in chunk if entry is not None]
                skipped, read = skipped + len(chunk) - len(good), read + len(chunk)
                pages.executemany(_BETTER, (entry for entry in good if entry[0] >= 0))
            (count,) = pages.execute("SELECT count(*) FROM pages").fetchone()
            pages.execute("CREATE TABLE about (skipped INTEGER)")
            pages.execute("INSERT INTO about VALUES (?)", (skipped,))
            pages.commit()
            pages.close()
            if skipped > 0.01 * read:
                raise DataError(
                    f"{skipped} of {read} lines of {dump} have no page number, topic and score where they should be: "
                    f"are its columns {', '.join(columns or COLUMNS)}? Give columns=[…] in the file's order."
                )
            if not count:
                raise DataError(f"{dump} has no page of {wiki!r}.")
        return cls(path)

    def get(self, page: object) -> str | None:
        """The page's topic; ``None`` where it has none."""
        try:
            row = self._pages.execute("SELECT topic FROM pages WHERE page = ?", (int(str(page)),)).fetchone()
        except ValueError:
            raise DataError(f"an article has id {page!r}; ORES topics are found by page number.") from None
        return None if row is None else str(row[0])

    def counts(self) -> dict[str, int]:
        """Pages by topic."""
        return dict(self._pages.execute("SELECT topic, count(*) FROM pages GROUP BY topic ORDER BY topic"))

    def close(self) -> None:
        self._pages.close()


Entry = tuple[int, str, int, float]


def _entries(dump: Path, wiki: str, columns: Sequence[str] | None) -> Iterator[Entry | None]:
    """Page, topic, asterisk, score of each line; page -1 in another wiki; ``None`` for what cannot be read."""
    lines = csv.reader(_decoded(dump))
    first = next(lines, None)
    if first is None:
        raise DataError(f"{dump} is empty.")
    header = [cell.strip().lower().lstrip("#") for cell in first]
    has_header = columns is None and any(name in header for name in _NAMES["topic"])
    names = header if has_header else [name.lower() for name in columns or COLUMNS]
    at: dict[str, int] = {}
    for name, known in _NAMES.items():
        found = [names.index(other) for other in known if other in names]
        if not found and name != "source":
            raise DataError(f"{dump}: no column {name} among {', '.join(names)}; it may be called {', '.join(known)}.")
        at[name] = found[0] if found else -1
    if not has_header:
        entry = _entry(first, len(names), at, wiki)
        if entry is None:
            raise DataError(
                f"{dump}, line 1: {', '.join(first[:6])!r} does not read {', '.join(names)}: give columns=[…] in the "
                f"file's order, or a header line."
            )
        yield entry
    while True:
        try:
            row = next(lines, None)
        except csv.Error:
            yield None
            continue
        if row is None:
            return
        yield _entry(row, len(names), at, wiki)


def _entry(row: list[str], width: int, at: dict[str, int], wiki: str) -> Entry | None:
    if len(row) != width:
        return None
    page, topic, score = (row[at[name]].strip() for name in ("page_id", "topic", "score"))
    try:
        value = float(score)
    except ValueError:
        return None
    if not page.isdecimal() or not topic or topic.isdecimal() or not 0 <= value <= 1:
        return None
    if at["source"] >= 0 and row[at["source"]].strip() != wiki:
        return -1, topic, 0, value
    return int(page), topic, int("*" in topic), value


def _decoded(path: Path) -> Iterator[str]:
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    with opened(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield _text(line, "utf-8-sig" if number == 1 else "utf-8", path, number)


def _text(line: bytes, encoding: str, path: Path, number: int) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}, is not UTF-8 ({error.reason}); convert it to UTF-8.") from error
