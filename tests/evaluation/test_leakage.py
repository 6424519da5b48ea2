"""Equation 1 by hand, on exact curves, and where it cannot say more than a bound."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.errors import DataError
from gradsurgery.evaluation import leakage

BASELINES = [(0.0, 9.0), (10.0, 6.0), (50.0, 4.0)]


@pytest.mark.parametrize(
    ("loss", "equivalent"),
    [(9.0, 0.0), (7.5, 5.0), (6.0, 10.0), (5.0, 30.0), (4.5, 40.0), (4.0, 50.0)],  # two straight lines
)
def test_by_hand(loss, equivalent):
    found = leakage(loss, 200.0, reversed(BASELINES))
    assert (found.equivalent, found.value) == (pytest.approx(equivalent), pytest.approx(equivalent / 200))
    assert (found.bound, found.crossings) == ("=", 1)


def test_outside_of_the_baselines_it_is_a_bound():
    high, low = leakage(9.5, 100.0, BASELINES[1:]), leakage(3.0, 100.0, BASELINES)
    assert (high.value, high.bound, str(high)) == (0.1, "<=", "<= 0.1")
    assert (low.value, low.bound, str(low)) == (0.5, ">=", ">= 0.5")


def test_noisy_baselines_say_how_often_they_cross():
    found = leakage(5.0, 10.0, [(0, 6.0), (2, 4.0), (4, 6.0), (6, 4.0)])
    assert (found.equivalent, found.crossings) == (1.0, 3)


@settings(max_examples=100, deadline=None)
@given(
    amounts=st.lists(st.integers(0, 1000), min_size=2, max_size=7, unique=True).map(sorted),
    share=st.floats(0, 1),
    unlabelled=st.floats(1, 1e9),
    slope=st.floats(1e-3, 10),
)
def test_data_filtering_leaks_what_it_was_exposed_to(amounts, share, unlabelled, slope):
    """Losses on one line: whatever amount a model really needed is found again."""
    true = amounts[0] + share * (amounts[-1] - amounts[0])
    found = leakage(20 - slope * true / 1000, unlabelled, [(a, 20 - slope * a / 1000) for a in amounts])
    assert found.equivalent == pytest.approx(true, abs=1e-6 * max(amounts) + 1e-9)


@pytest.mark.parametrize(
    ("loss", "unlabelled", "baselines", "said"),
    [
        (5.0, 1.0, [(1.0, 5.0)], "at least 2, not 1"),
        (5.0, 0.0, BASELINES, "unlabelled=0.0"),
        (float("nan"), 1.0, BASELINES, "no number"),
        (5.0, 1.0, [(1.0, 5.0), (1.0, 6.0)], "give their mean"),
        (5.0, 1.0, [(-1.0, 5.0), (1.0, 6.0)], "no number"),
    ],
)
def test_refusals(loss, unlabelled, baselines, said):
    with pytest.raises(DataError, match=said):
        leakage(loss, unlabelled, baselines)
