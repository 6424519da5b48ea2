"""The Wikipedia pipeline: best topics by a slow oracle, sequences token for token, memory that does not grow."""

from __future__ import annotations

import csv
import gc
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.data import (
    Explorer,
    Noise,
    TopicIndex,
    load_articles,
    load_tokenizer,
    prepare_articles,
    stream_articles,
)
from gradsurgery.data.article_packing import _hash
from gradsurgery.data.ores import COLUMNS
from gradsurgery.errors import ArtefactError, DataError

TOPICS = [
    "STEM.Biology",
    "STEM.Chemistry",
    "STEM.STEM*",
    "Culture.Media.Films",
    "Culture.Media.Media*",
    "Geography.Asia",
]
ROW = st.fixed_dictionaries(
    {
        "wikidata_id": st.just("Q1"),
        "page_id": st.integers(1, 9),
        "title": st.sampled_from(["A, B", 'The "C"', "Ünï", ""]),
        "source": st.sampled_from(["enwiki", "dewiki"]),
        "topic": st.sampled_from(TOPICS),
        "score": st.integers(0, 4).map(lambda k: k / 4),
    }
)


def dump(path: Path, rows: list[dict[str, Any]], columns: list[str], header: bool) -> Path:
    text = io.StringIO()
    writer = csv.writer(text)
    if header:
        writer.writerow(columns)
    writer.writerows([row[name] for name in columns] for row in rows)
    raw = text.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=30),
    columns=st.permutations(COLUMNS),
    how=st.sampled_from(["header", "columns"]),
    ending=st.sampled_from(["csv", "csv.gz"]),
)
def test_best_topics_in_any_column_order(tmp_path_factory, rows, columns, how, ending) -> None:
    folder = tmp_path_factory.mktemp("ores")
    rows = [*rows, {**rows[0], "source": "enwiki", "page_id": 10}]
    path = dump(folder / f"topics.{ending}", rows, columns, header=how == "header")
    index = TopicIndex.build(path, folder / "index", columns=None if how == "header" else columns)
    for page in range(12):
        mine = [r for r in rows if r["page_id"] == page and r["source"] == "enwiki"]
        best = min(mine, key=lambda r: ("*" in r["topic"], -r["score"], r["topic"]), default=None)
        assert index.get(page) == index.get(str(page)) == (best["topic"] if best else None)
    assert sum(index.counts().values()) == len({r["page_id"] for r in rows if r["source"] == "enwiki"})
    assert index.skipped == 0


def test_bad_dumps(tmp_path: Path) -> None:
    good = [{n: {"page_id": 1, "topic": "A.B", "score": 0.5, "source": "enwiki"}.get(n, "x") for n in COLUMNS}] * 200
    other = dump(tmp_path / "other.csv", good, [*COLUMNS[::-1]], header=False)
    late = tmp_path / "late.csv"
    late.write_bytes(dump(tmp_path / "a.csv", good, [*COLUMNS], True).read_bytes() + b"Q1,x\n" * 5)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("wiki_db,pid,topic,probability\nenwiki,1,Ärzte,0.5\n".encode("latin-1"))
    wrong = dump(tmp_path / "wrong.csv", good, ["title", "topic", "score"], header=True)
    (tmp_path / "empty.csv").write_bytes(b"")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (other, {}, "line 1.*give columns"),
        (late, {}, "5 of 205 lines"),
        (latin, {}, "line 2, is not UTF-8"),
        (wrong, {}, "no column page_id among title, topic, score"),
        (tmp_path / "empty.csv", {}, "is empty"),
        (tmp_path / "none.csv", {}, "analytics.wikimedia.org"),
        (other, {"columns": COLUMNS[::-1], "wiki": "frwiki"}, "no page of 'frwiki'"),
    ]
    for path, options, said in cases:
        with pytest.raises(DataError, match=said):
            TopicIndex.build(path, tmp_path / "index", **options)
        assert not (tmp_path / "index").exists() and not list(tmp_path.glob(".index*"))
    (tmp_path / "text").write_text("no database, whatever it may be called, and long enough for a header of one" * 3)
    with pytest.raises(DataError, match="no topic index"):
        TopicIndex(tmp_path / "text")


def topic_of(page: int) -> str:
    return TOPICS[page % 6]


@pytest.fixture
def index(tmp_path: Path) -> TopicIndex:
    rows = [{"page_id": p, "topic": topic_of(p), "score": 0.9, "source": "enwiki"} for p in range(1, 3001)]
    path = dump(tmp_path / "topics.csv", rows, ["page_id", "topic", "score", "source"], header=True)
    return TopicIndex.build(path, tmp_path / "index")


ROLES: dict[str, Any] = {"forget": ["STEM.Biology"], "adjacent": ["STEM.Chemistry"]}


def text_of(page: int) -> str:
    return f"Article {page}. " + " ".join(random.Random(page).choices(["heaven", "and", "earth", "was", "void"], k=30))


def articles(pages: int) -> list[dict[str, str]]:
    return [{"id": str(p), "text": text_of(p)} for p in range(pages)]  # page 0 has no topic


def test_sequences_hold_the_articles_of_their_category_and_side(tmp_path: Path, index: TopicIndex) -> None:
    tokenizer, given_ = load_tokenizer(), articles(240)
    found = prepare_articles(lambda: given_, index, tmp_path / "out", tokenizer, context=16, test_articles=5, **ROLES)
    assert found.categories == ("Culture", "Geography", "STEM", "STEM.Biology", "STEM.Chemistry")
    assert found.of_role("forget") == ("STEM.Biology",) and found.about["without_topic"] == 1
    name_of = {
        p: t if t in ("STEM.Biology", "STEM.Chemistry") else t.split(".")[0]
        for p in range(1, 240)
        if (t := topic_of(p))
    }
    for k, category in enumerate(found.categories):
        pages = [p for p in range(1, 240) if name_of[p] == category]
        test = set(sorted(pages, key=lambda p: _hash(str(p)))[:5])
        for side, chosen in (("train", [p for p in pages if p not in test]), ("test", [p for p in pages if p in test])):
            stream = [t for p in chosen for t in (*tokenizer(text_of(p))["input_ids"], tokenizer.eos_token_id)]
            whole = torch.tensor(stream[: len(stream) // 16 * 16], dtype=torch.int32).view(-1, 16)
            assert torch.equal(found.sequences[side][found.category[side] == k], whole)
    rows = found.rows(noise=Noise(tpr=0.5, fpr=0.1), retain_retain=1.0)
    forget = rows.category == found.categories.index("STEM.Biology")
    assert rows.forget[forget].float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert rows.forget[~forget].float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert set(found.held_back(3)) == set(found.categories) and len(found.held_back(3)["STEM"]) == 3
    again = load_articles(tmp_path / "out")
    assert again.about == found.about and torch.equal(again.sequences["test"], found.sequences["test"])
    assert not list(tmp_path.glob(".out*"))


def test_repeated_articles_are_left_out_with_a_warning(tmp_path: Path, index: TopicIndex) -> None:
    once = articles(120)
    more = [*once, once[7], {"id": "2000", "text": once[8]["text"].upper()}, {"id": "9", "text": "another text"}]
    options: dict[str, Any] = {"context": 16, "test_articles": 5, **ROLES}
    plain = prepare_articles(lambda: once, index, tmp_path / "once", load_tokenizer(), **options)
    with pytest.warns(UserWarning, match="3 articles are left out"):
        found = prepare_articles(lambda: more, index, tmp_path / "more", load_tokenizer(), **options)
    for side in ("train", "test"):
        assert torch.equal(found.sequences[side], plain.sequences[side])


class Counted(dict[str, str]):
    """An article that knows how many of its kind there are at the moment, and were at most."""

    alive: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, **values: str) -> None:
        super().__init__(**values)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, index: TopicIndex) -> None:
    def source(pages: int) -> Iterator[Counted]:
        return (Counted(id=str(p), text=text_of(p)) for p in range(pages))

    most = {}
    for pages in (300, 3000):
        gc.collect()
        Counted.most = Counted.alive
        options: dict[str, Any] = {"context": 16, "test_articles": 5, "explorer": Explorer(repeats=False), **ROLES}
        prepare_articles(partial(source, pages), index, tmp_path / str(pages), load_tokenizer(), **options)
        most[pages] = Counted.most
    assert most[3000] == most[300] <= 2 * 64 + 2  # one batch, and the next as it comes


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_corpus(tmp_path: Path, index: TopicIndex) -> None:
    """Bytes that Python holds at most, with ten times the articles."""
    tokenizer, peaks = load_tokenizer(), {}
    long = " ".join(random.Random(0).choices(["heaven", "and", "earth", "was", "void"], k=400))
    options: dict[str, Any] = {"context": 64, "test_articles": 5, **ROLES}
    for pages in (100, 300, 3000):  # the first warms up
        gc.collect()
        tracemalloc.start()

        def source(pages: int = pages) -> Iterator[dict[str, str]]:
            return ({"id": str(p), "text": f"{p} {long}"} for p in range(pages))

        explorer = Explorer(repeats=False)
        prepare_articles(source, index, tmp_path / str(pages), tokenizer, explorer=explorer, **options)
        peaks[pages] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[3000] - peaks[300] < 0.05 * 2700 * len(long), peaks  # of the text that there is more


def test_refusals(tmp_path: Path, index: TopicIndex) -> None:
    tokenizer = load_tokenizer()

    def prepare(rows: list[dict[str, Any]], **more: Any) -> Any:
        options = {"context": 16, "test_articles": 5, **ROLES, **more}
        return prepare_articles(lambda: rows, index, tmp_path / "out", tokenizer, **options)

    for call, said in (
        (lambda: prepare(articles(20)), "has 6 articles|has 3 articles|has 4 articles"),
        (lambda: prepare([a for a in articles(200) if int(a["id"]) % 6]), "no article of STEM.Biology"),
        (lambda: prepare(articles(99), forget=["STEM.Biologie"]), "'STEM.Biologie'; near ones: STEM.Biology"),
        (lambda: prepare(articles(99), forget=[]), "names no category"),
        (lambda: prepare(articles(99), adjacent=["STEM.Biology"]), "both forget and adjacent"),
        (lambda: prepare([{"title": "x"}]), "needs id and text; one has title"),
        (lambda: prepare([{"id": "Q5", "text": "x"}]), "id 'Q5'"),
        (lambda: prepare(articles(99), context=1), "context=1"),
        (lambda: prepare(articles(99), context=10**6), "do not fill one sequence"),
    ):
        with pytest.raises(DataError, match=said):
            call()
        assert not list(tmp_path.glob("*out*"))
    with pytest.raises(ArtefactError, match="does not exist"):
        load_articles(tmp_path)
    made = prepare(articles(99))
    assert made.about["articles"]["test"] == 25
    with pytest.raises(DataError, match="exists already"):
        prepare(articles(99))
    with open(tmp_path / "out" / "train.tokens", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="bytes that the manifest says"):
        load_articles(tmp_path / "out")


def test_streams_of_local_files(tmp_path: Path) -> None:
    rows = articles(5)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    source = stream_articles(tmp_path)
    assert list(source()) == list(source()) == rows * 2
    (tmp_path / "c.jsonl").write_bytes(b'{"id": 1}\n{"id"')
    with pytest.raises(DataError, match="line 2: no JSON"):
        list(stream_articles(tmp_path)())
    (tmp_path / "c.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match="line 1, is not UTF-8"):
        list(stream_articles(tmp_path)())
    with pytest.raises(DataError, match="give local files"):
        list(stream_articles("hub:nobody/nothing")())
