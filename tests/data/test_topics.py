"""Topics: everything is there once, groups partition it, held-back text is never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.data import Document, Split, group_topics, load_topics, without_repeats
from gradsurgery.data.topics import ADJACENT, FORGET
from gradsurgery.errors import DataError


@pytest.fixture(scope="module")
def topics() -> dict[str, Split]:
    return load_topics()


def every(part: Split) -> list[Document]:
    return [*part.train, *part.validation]


def test_every_entry_is_there_once(topics: dict[str, Split]) -> None:
    documents = [d for part in topics.values() for d in every(part)]
    assert len(documents) == len({d.id for d in documents}) == 105_832 and len(topics) == 43
    assert sum(len(every(topics[t])) for t in FORGET) == 15_658
    assert sum(len(every(topics[t])) for t in ADJACENT) == 8_129


def test_no_held_back_text_is_trained_on(topics: dict[str, Split]) -> None:
    assert without_repeats(topics) == topics  # a warning would be an error


@settings(max_examples=60, deadline=None)
@given(order=st.permutations("abcdef"), forget=st.integers(1, 3), adjacent=st.integers(0, 2))
def test_groups_partition_the_topics(order: list[str], forget: int, adjacent: int) -> None:
    corpus = {name: Split([Document(f"{name}{i}", "t") for i in range(3)], [Document(name, "v")]) for name in "abcdef"}
    cut = forget + adjacent
    groups = group_topics(corpus, order[:forget], order[forget:cut])
    expected = {"forget": order[:forget], "adjacent": order[forget:cut], "retain": order[cut:]}
    assert groups.keys() == {name for name, topics in expected.items() if topics}
    for name, part in groups.items():
        for side in ("train", "validation"):
            ids = [d.id for d in getattr(part, side)]
            assert sorted(ids) == sorted(d.id for topic in expected[name] for d in getattr(corpus[topic], side))


def test_a_limit_is_spread_over_a_topic(topics: dict[str, Split]) -> None:
    few = load_topics(limit=30)
    assert all(len(every(part)) == min(30, len(every(topics[name]))) for name, part in few.items())
    assert len({d.text[0] for d in every(few["plant"])}) > 10  # entries are in taxonomic order


def test_files_of_ones_own(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"text {i}", "topic": "ab"[i % 2]} for i in range(20)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {name: len(every(part)) for name, part in load_topics(tmp_path).items()} == {"a": 10, "b": 10}


def test_repeated_texts_are_left_out_with_a_warning() -> None:
    corpus = {
        "a": Split([Document("1", "The  Cat.")], [Document("2", "the cat."), Document("3", "A dog.")]),
        "b": Split([Document("4", "x")], [Document("5", "THE CAT.")]),
    }
    with pytest.warns(UserWarning, match="2 held-back documents"):
        found = without_repeats(corpus)
    assert [d.id for part in found.values() for d in part.validation] == ["3"]


def test_refusals(topics: dict[str, Split], tmp_path: Path) -> None:
    (tmp_path / "no_text.jsonl").write_text('{"title": "x"}\n')
    few = {name: Split(part.train, []) if name == "plant" else part for name, part in topics.items()}
    for call, said in (
        (lambda: group_topics(topics, ["plants"]), "no topic 'plants'; near ones: plant"),
        (lambda: group_topics(topics, ["plant"], ["plant", "food"]), "plant is both"),
        (lambda: group_topics(topics, []), r"forget \(no topic\) has no training"),
        (lambda: group_topics(few, ["plant"]), r"forget \(plant\) has no validation document"),
        (lambda: load_topics(limit=0), "limit=0"),
        (lambda: load_topics(tmp_path), "has no text"),
        (lambda: load_topics(tmp_path / "nowhere"), "does not exist"),
    ):
        with pytest.raises(DataError, match=said):
            call()
