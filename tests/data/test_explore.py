"""Exploring a corpus: by hand, against a slow oracle, and in bounded memory."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.data import Document, Explorer, Split, distinctive_words, explore_corpus
from gradsurgery.errors import DataError
from gradsurgery.runs.exploration import write_exploration

COUNTS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 40), min_size=1)
CORPUS = {
    "cats": Split(
        [Document("1", "The cat, the CAT."), Document("2", "A cat")], [Document("3", "a  cat"), Document("4", "Dog")]
    ),
    "cars": Split([Document("5", "The car"), Document("6", "a cat")], [Document("7", "the car")]),
}
LENGTHS = {"train": {"cats": [4, 2], "cars": [2, 9]}, "validation": {"cats": [3, 1], "cars": [2]}}


def test_distinctive_words_by_hand() -> None:
    """Two categories of 4 and 6 words, prior of 10 words: shares of the, cat, car are 5, 3, 2 of 10."""
    found = distinctive_words({"a": {"the": 2, "cat": 2}, "b": {"the": 3, "cat": 1, "car": 2}}, strength=10.0)
    odds = math.log((2 + 3) / (4 + 10 - 5)) - math.log((1 + 3) / (6 + 10 - 4))
    assert found["a"][0] == ("cat", pytest.approx(odds / math.sqrt(1 / 5 + 1 / 4)))
    odds = math.log((2 + 2) / (6 + 10 - 4)) - math.log((0 + 2) / (4 + 10 - 2))
    assert found["b"][0] == ("car", pytest.approx(odds / math.sqrt(1 / 4 + 1 / 2)))


@settings(max_examples=80, deadline=None)
@given(first=COUNTS, second=COUNTS, strength=st.floats(0.1, 1e4))
def test_two_categories_are_each_others_opposite(
    first: dict[str, int], second: dict[str, int], strength: float
) -> None:
    """z changes its sign with the categories, so no word sets both apart; only words of a category stand for it."""
    found = distinctive_words({"a": first, "b": second}, 99, strength)
    assert not {w for w, _ in found["a"]} & {w for w, _ in found["b"]}
    for name, of in (("a", first), ("b", second)):
        scores = [z for _, z in found[name]]
        assert {w for w, _ in found[name]} <= set(of) and scores == sorted(scores, reverse=True)
        assert distinctive_words({"a": first, "b": second}, 2, strength)[name] == found[name][:2]


def test_a_corpus_by_hand() -> None:
    found = explore_corpus(CORPUS, LENGTHS)
    cats, held_back = found.sizes[2], found.sizes[3]
    assert cats == {
        "category": "cats",
        "side": "train",
        "documents": 2,
        "tokens": 6,
        "share of tokens": 6 / 17,
        "mean length": 3.0,
        "median length": 3.0,
        "longest": 4,
    }
    assert held_back["documents"] == 2 and held_back["share of tokens"] == 4 / 6
    assert found.lengths == {"cats": [(1, 1), (2, 2), (4, 1)], "cars": [(2, 2), (8, 1)]}
    # cats: the 2, cat 4, a 2, dog 1; cars: the 2, car 2, a 1, cat 1
    assert found.overlap == [
        {"of": "cars", "found in": "cats", "word types": 3 / 4, "running words": 4 / 6},
        {"of": "cats", "found in": "cars", "word types": 3 / 4, "running words": 8 / 9},
    ]
    repeats = {(row["held back"], row["trained on"]): row["documents"] for row in found.repeats or []}
    assert repeats == {("cats", "cats"): 1, ("cats", "cars"): 1, ("cars", "cars"): 1}
    assert found.words["cars"][0][0] == "car"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.sampled_from(["train", "validation"]),
            st.sampled_from(["x", "X", "x y", "z"]),
            st.integers(0, 9),
        ),
        min_size=1,
    )
)
def test_everything_is_counted(documents: list[tuple[str, str, str, int]]) -> None:
    explorer = Explorer()
    for category, side, text, tokens in documents:
        explorer.add(category, side, text, tokens)
    found = explorer.result()
    for row in found.sizes:
        lengths = sorted(n for c, s, _, n in documents if (c, s) == (row["category"], row["side"]))
        assert (row["documents"], row["tokens"]) == (len(lengths), sum(lengths))
        if lengths:
            assert row["median length"] == (lengths[(len(lengths) - 1) // 2] + lengths[len(lengths) // 2]) / 2
    trained = {(c, t.lower()) for c, s, t, _ in documents if s == "train"}
    expected = Counter(
        (c, b) for c, s, t, _ in documents if s == "validation" for b in "ab" if (b, t.lower()) in trained
    )
    assert {(r["held back"], r["trained on"]): r["documents"] for r in found.repeats or []} == expected


def test_memory_is_bounded_by_the_vocabulary() -> None:
    explorer = Explorer(repeats=False, most_words=10)
    letters = "abcdefghij"
    for k in range(2000):
        explorer.add("a", "train", "common " + "".join(letters[int(c)] for c in str(k)), 2)
        assert len(explorer._words["a"]) <= 21  # one document above twice as many
    found = explorer.result()
    assert found.approximate and found.repeats is None and explorer._words["a"]["common"] == 2000


def test_the_report_stands_alone(tmp_path: Path) -> None:
    found = explore_corpus(CORPUS, LENGTHS)
    page = write_exploration(tmp_path / "run", found, "A corpus", {"data": "here"}).read_text(encoding="utf-8")
    for said in ("Most distinctive words", "Shared vocabulary", "whose text is trained on", "data:image/png", "car "):
        assert said in page
    assert "https://" not in page and "http://" not in page
    stored = json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(found.plain())) and stored["sizes"][0]["category"] == "cars"
    alone = Explorer(repeats=False)
    alone.add("one", "train", "42", 0)  # no word, no token, nothing to compare with
    page = write_exploration(tmp_path / "one", alone.result(), "One", {}).read_text(encoding="utf-8")
    assert "were not looked for" in page and "distinctive" not in page


def test_refusals() -> None:
    for call, said in (
        (lambda: Explorer().result(), "no document"),
        (lambda: Explorer().add("a", "test", "x", 1), "side='test'"),
        (lambda: Explorer(most_words=0), "most_words=0"),
        (lambda: distinctive_words({"a": {"x": 1}}), "given are a"),
        (lambda: distinctive_words({"a": {"x": 1}, "b": {}}), "b has none"),
        (lambda: distinctive_words({"a": {"x": 1}, "b": {"x": 1}}, strength=0), "strength=0"),
    ):
        with pytest.raises(DataError, match=said):
            call()
