"""Sorting and packing articles as they stream by; `gradsurgery.data.articles` says what for."""

from __future__ import annotations

import difflib
import heapq
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch

from gradsurgery.data.explore import Explorer
from gradsurgery.data.ores import TopicIndex
from gradsurgery.errors import DataError

SIDES = ("train", "test")
Source = Callable[[], Iterable[Mapping[str, Any]]]


class ArticleSorter:
    """Tells each article's category and side of the split, and lets each through once.

    What was seen is kept on disk.
    """

    def __init__(self, topics: TopicIndex, forget: Collection[str], adjacent: Collection[str], seen: Path) -> None:
        if both := set(forget) & set(adjacent):
            raise DataError(f"category {', '.join(sorted(both))} is both forget and adjacent.")
        known = topics.counts()
        for name in (*forget, *adjacent):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(known)[:5]
                raise DataError(f"no page has the topic {name!r}; near ones: {', '.join(near)}.")
        if not forget:
            raise DataError("forget names no category: nothing would be removed.")
        self.topics, self.forget, self.adjacent = topics, set(forget), set(adjacent)
        self.names: list[str] = []
        self.seen = sqlite3.connect(seen)
        self.seen.execute("PRAGMA journal_mode = OFF")
        self.seen.execute("CREATE TABLE texts (digest BLOB PRIMARY KEY, page TEXT, written INTEGER) WITHOUT ROWID")
        self.seen.execute("CREATE TABLE pages (page TEXT PRIMARY KEY) WITHOUT ROWID")
        self.path = seen

    def close(self) -> None:
        self.seen.close()
        self.path.unlink()

    def roles(self) -> dict[str, str]:
        role = {**dict.fromkeys(self.adjacent, "adjacent"), **dict.fromkeys(self.forget, "forget")}
        return {name: role.get(name, "retain") for name in self.names}

    def of(self, article: Mapping[str, Any]) -> str | None:
        topic = self.topics.get(article["id"])
        if topic is None or not article["text"].strip():
            return None
        return topic if topic in self.forget | self.adjacent else topic.split(".")[0]

    def choose(self, articles: Iterator[Mapping[str, Any]], test_articles: int) -> dict[str, int]:
        """By category the largest hash of an id that is held back."""
        smallest: dict[str, list[int]] = {}
        counts: dict[str, int] = {}
        for article in articles:
            name = self.of(article)
            if name is None or not self._first_time(article):
                continue
            counts[name] = counts.get(name, 0) + 1
            heap, value = smallest.setdefault(name, []), -_hash(str(article["id"]))
            (heapq.heappush if len(heap) < test_articles else heapq.heappushpop)(heap, value)
        if empty := (self.forget | self.adjacent) - set(counts):
            raise DataError(f"no article of {', '.join(sorted(empty))} is in the text: nothing to train or test.")
        if few := [name for name, count in counts.items() if count <= test_articles]:
            raise DataError(
                f"{few[0]} has {counts[few[0]]:,} articles, and {test_articles:,} to be held back leave none to train "
                f"on: lower test_articles."
            )
        self.names = sorted(counts)
        return {name: -heap[0] for name, heap in smallest.items()}

    def write(
        self,
        articles: Iterator[Mapping[str, Any]],
        out: Path,
        tokenizer: Any,
        context: int,
        last: Mapping[str, int],
        explorer: Explorer | None = None,
    ) -> dict[str, Any]:
        """Pack each category's tokens as they come; at most one sequence's worth of each waits."""
        waiting: dict[tuple[str, str], list[int]] = {}
        counts = {"articles": dict.fromkeys(SIDES, 0), "sequences": dict.fromkeys(SIDES, 0)}
        left_out = {"repeated": 0, "without_topic": 0}
        with ExitStack() as stack:
            files = {
                (side, kind): stack.enter_context(open(out / f"{side}.{kind}", "wb"))
                for side in SIDES
                for kind in ("tokens", "categories")
            }
            while batch := list(islice(articles, 64)):
                kept = []
                for article in batch:
                    name = self.of(article)
                    if name is None:
                        left_out["without_topic"] += 1
                    elif not self._to_write(article):
                        left_out["repeated"] += 1
                    else:
                        kept.append((name, article))
                tokens = tokenizer([a["text"] for _, a in kept], add_special_tokens=False)["input_ids"] if kept else []
                for (name, article), ids in zip(kept, tokens, strict=True):
                    side = SIDES[_hash(str(article["id"])) <= last[name]]
                    counts["articles"][side] += 1
                    if explorer is not None:
                        explorer.add(name, "train" if side == "train" else "validation", article["text"], len(ids))
                    buffer = waiting.setdefault((side, name), [])
                    buffer += [*ids, tokenizer.eos_token_id]
                    whole = len(buffer) // context
                    _append(files[side, "tokens"], buffer[: whole * context], torch.int32)
                    _append(files[side, "categories"], [self.names.index(name)] * whole, torch.int16)
                    counts["sequences"][side] += whole
                    del buffer[: whole * context]
        if none := [side for side, count in counts["sequences"].items() if not count]:
            raise DataError(f"the {none[0]} articles do not fill one sequence of {context} tokens: give more text.")
        return {**counts, **left_out}

    def _first_time(self, article: Mapping[str, Any]) -> bool:
        page = str(article["id"])
        if not self.seen.execute("INSERT OR IGNORE INTO pages VALUES (?)", (page,)).rowcount:
            return False
        row = (_digest(article["text"]), page)
        return bool(self.seen.execute("INSERT OR IGNORE INTO texts VALUES (?, ?, 0)", row).rowcount)

    def _to_write(self, article: Mapping[str, Any]) -> bool:
        row = (_digest(article["text"]), str(article["id"]))
        done = self.seen.execute("UPDATE texts SET written = 1 WHERE digest = ? AND page = ? AND NOT written", row)
        return bool(done.rowcount)


def checked(articles: Source, limit: int | None) -> Iterator[Mapping[str, Any]]:
    for article in islice(articles(), limit):
        if "id" not in article or not isinstance(article.get("text"), str):
            raise DataError(f"an article needs id and text; one has {', '.join(map(str, article)) or 'nothing'}.")
        yield article


def _append(file: IO[bytes], values: list[int], dtype: torch.dtype) -> None:
    if values:
        file.write(torch.tensor(values, dtype=dtype).numpy().tobytes())


def _hash(page: str) -> int:
    return int.from_bytes(blake2b(page.encode(), digest_size=8, person=b"test").digest(), "big")


def _digest(text: str) -> bytes:
    return blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
