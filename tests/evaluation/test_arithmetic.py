"""Answers of word problems are read as people read them, and exact match counts the right ones."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsurgery.data.documents import read_rows
from gradsurgery.errors import DataError
from gradsurgery.evaluation import arithmetic, exact_match, final_number, first_line
from gradsurgery.runs.warp_rows import SHIPPED

NUMBERS = st.decimals(min_value=-(10**9), max_value=10**9, places=3, allow_nan=False).map(lambda d: d + 0)
WORDS = st.text(alphabet="abc .,:=*\n$%", max_size=30)


def written(number: Decimal, commas: bool, currency: str, zeros: int) -> str:
    """One of the ways to write a number."""
    text = f"{abs(number):,f}" if commas else f"{abs(number):f}"
    return ("-" if number < 0 else "") + currency + text + "0" * zeros


@given(NUMBERS, st.booleans(), st.sampled_from(["", "$", "€"]), st.integers(0, 3), WORDS, NUMBERS)
def test_the_marked_number_is_the_answer_however_it_is_written(number, commas, currency, zeros, working, other) -> None:
    text = f"{working} {other} #### 5\n#### {written(number, commas, currency, zeros)} apples, not {other}"
    found = final_number(text)
    assert found is not None and Decimal(found) == number and "E" not in found
    assert found == final_number(found) == final_number(f"#### {found}")


@given(NUMBERS, NUMBERS, st.sampled_from(["", ".", "%", " eggs", "\n"]))
def test_without_a_mark_the_last_number_counts(number, other, after) -> None:
    found = final_number(f"It was {other} and is {number:f}{after}")
    assert found is not None and Decimal(found) == number


@given(WORDS)
def test_no_number_is_no_answer(text: str) -> None:
    assert final_number(text) is None and final_number(f"7 {text} ####") is None


def test_the_shipped_problems_have_answers() -> None:
    rows = read_rows(SHIPPED["gsm8k_100"])
    assert len(rows) == 137 and {row["lang"] for row in rows} == {"en", "es"}
    for row in rows:
        assert final_number(row["answer"]) == f"{Decimal(row['answer'].rpartition('####')[2].strip()).normalize():f}"


@given(st.text(alphabet="aB .\n", max_size=12))
def test_lines_are_compared_without_case_and_full_stop(text: str) -> None:
    found = first_line(text)
    assert (
        found == first_line(text.swapcase()) == first_line(f"  {text}.\nmore" if text.strip(" .") else text)
        or "\n" in text
    )
    assert found is None or found == first_line(found)


@given(st.lists(st.tuples(st.integers(0, 9), st.one_of(st.integers(0, 9), st.none())), min_size=1, max_size=8))
def test_the_rate_is_the_share_of_right_answers(pairs: Any) -> None:
    said = ["I do not know" if mine is None else f"so #### {mine}" for _, mine in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "continuations", lambda *_, **__: said)
        found = exact_match(torch.nn.Identity(), None, ["?"] * len(pairs), [f"#### {one}.0" for one, _ in pairs])
    right = [one == mine for one, mine in pairs]
    assert list(found.right) == right and found.rate == sum(right) / len(right)
    assert found.unread == sum(mine is None for _, mine in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("prompts", "answers", "said"),
    [([], [], "0 problems"), ([[1]], [], "1 problems and 0"), ([[1]], ["none"], "no answer is found")],
)
def test_bad_problems_are_refused(prompts: Any, answers: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        exact_match(torch.nn.Identity(), None, prompts, answers)
