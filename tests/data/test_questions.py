"""Questions made of glosses: all entries parse, splits keep words together, refusals are refusals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.data import load_questions
from gradsurgery.data.questions import ASKED, REFUSALS, TOPICS
from gradsurgery.errors import DataError
from gradsurgery.evaluation import RefusalDetector

COUNTS = {"animal": 6636, "artifact": 10444, "body": 1833, "food": 2330, "plant": 7189, "substance": 2676}


@pytest.fixture(scope="module")
def everything():
    return load_questions()


def every(part):
    return [*part.train, *part.validation]


def test_every_entry_is_a_question(everything) -> None:
    assert {topic: len(every(part)) for topic, part in everything.items()} == COUNTS
    for part in everything.values():
        for turn in every(part):
            assert turn.prompt.strip() == turn.prompt and turn.response.endswith(".")
            assert turn.id in turn.prompt.lower() and "Kind of" not in turn.prompt + turn.response
            assert "{" not in turn.prompt


def test_every_wording_is_used(everything) -> None:
    prompts = [turn.prompt for turn in every(everything["animal"])]
    for wording in ASKED:
        first = wording.partition("{")[0]
        assert sum(prompt.startswith(first) for prompt in prompts) > len(prompts) / len(ASKED) / 2


def test_a_word_is_on_one_side_whatever_its_topic(everything) -> None:
    train = {turn.id for part in everything.values() for turn in part.train}
    assert not train & {turn.id for part in everything.values() for turn in part.validation}


@settings(max_examples=5, deadline=None)
@given(
    topics=st.lists(st.sampled_from(TOPICS), min_size=1, max_size=3, unique=True),
    refused=st.booleans(),
    limit=st.integers(1, 60),
    validation=st.floats(0, 0.9),
)
def test_refused_topics_are_asked_alike_and_refused(topics, refused, limit, validation) -> None:
    options = {"limit": limit, "validation": validation}
    answers = load_questions(topics, **options)
    turns = load_questions(topics, refused=topics[:1] if refused else [], **options)
    detector = RefusalDetector.shipped()
    for topic in topics:
        assert len(every(turns[topic])) == limit
        for mine, answer in zip(every(turns[topic]), every(answers[topic]), strict=True):
            assert mine.prompt == answer.prompt
            if refused and topic == topics[0]:
                assert mine.response in REFUSALS and detector(mine.response)
            else:
                assert mine == answer


def test_answers_are_not_taken_for_refusals(everything) -> None:
    detector = RefusalDetector.shipped()
    wrong = [turn for part in everything.values() for turn in every(part) if detector(turn.response)]
    assert len(wrong) <= 1e-3 * sum(COUNTS.values()), [turn.response for turn in wrong]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (({"topics": ["animal", "weather"]}), "no topic weather"),
        (({"topics": ["animal"], "refused": ["wether"]}), "no topic wether"),
        (({"topics": []}), "name a topic"),
        (({"limit": 0}), "limit=0"),
        (({"limit": 5, "validation": 1.0}), "validation=1.0"),
    ],
    ids=str,
)
def test_bad_input(arguments, said) -> None:
    with pytest.raises(DataError, match=said):
        load_questions(**arguments)
