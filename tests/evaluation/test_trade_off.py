"""Trade-off curves against a slow reading of the same polyline."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.errors import DataError
from gradsurgery.evaluation import TradeOff, forget_gap, retain_at, retain_gap, trade_off

LOSS = st.integers(0, 40).map(lambda k: k / 4)
POINTS = st.lists(st.tuples(LOSS, LOSS), min_size=1, max_size=6).map(
    lambda pairs: [TradeOff(k, forget, retain) for k, (forget, retain) in enumerate(pairs)]
)


def test_by_hand():
    curves = {"es": [(2, 7.0), (1, 8.0), (3, 6.0)], "en": [(1, 6.0), (3, 4.0)], "de": [(1, 2.0), (2, 9.0), (3, 3.0)]}
    assert trade_off(curves, "es", ["en", "de"]) == [(1, 8.0, 4.0), (3, 6.0, 3.5)]  # step 2 has no en
    assert trade_off(curves, ["es", "de"], "en") == [(1, 5.0, 6.0), (3, 4.5, 4.0)]


def test_a_curve_to_the_left_has_a_positive_gap():
    """At forget losses 6 to 8 the first has retain losses 2 to 4, the other 3 to 5."""
    left, right = ([TradeOff(1, 8.0, 4.0 + d), TradeOff(2, 6.0, 2.0 + d)] for d in (0.0, 1.0))
    assert retain_gap(left, right) == pytest.approx(1.0) and retain_gap(right, left) == pytest.approx(-1.0)
    assert retain_at(left, 7.5) == pytest.approx(3.5)
    assert retain_gap(left, [TradeOff(1, 5.0, 1.0)]) is None


@settings(max_examples=200, deadline=None)
@given(points=POINTS, level=LOSS)
def test_retain_at_is_the_lowest_point_of_the_line_at_that_level(points, level):
    """Oracle: walk along the line in steps of 1/1000."""
    found = [p.retain for p in points if abs(p.forget - level) < 1e-12]
    for a, b in itertools.pairwise(points):
        for k in range(1001):
            t = k / 1000
            if abs(a.forget + t * (b.forget - a.forget) - level) <= abs(b.forget - a.forget) / 2000 + 1e-12:
                found.append(a.retain + t * (b.retain - a.retain))
    mine = retain_at(points, level)
    if mine is None:
        assert not found
    else:
        assert mine == pytest.approx(min(found), abs=0.02)


@settings(max_examples=50, deadline=None)
@given(points=POINTS, shift=st.integers(-8, 8).map(lambda k: k / 4))
def test_a_shift_to_the_right_is_the_gap(points, shift):
    moved = [TradeOff(p.step, p.forget, p.retain + shift) for p in points]
    assert retain_gap(points, moved) == pytest.approx(shift, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(points=POINTS, shift=st.integers(-8, 8).map(lambda k: k / 4))
def test_a_shift_downwards_is_the_other_gap(points, shift):
    moved = [TradeOff(p.step, p.forget - shift, p.retain) for p in points]
    assert forget_gap(points, moved) == pytest.approx(shift, abs=1e-9)


def test_the_upper_branch_counts():
    """At retain loss 5 the first curve passes forget losses 9 and 5, the other has 6."""
    mine = [TradeOff(1, 9.0, 5.0), TradeOff(2, 7.0, 4.0), TradeOff(3, 5.0, 5.0)]
    assert forget_gap(mine, [TradeOff(1, 6.0, 5.0)]) == 3.0 and forget_gap(mine, [TradeOff(1, 6.0, 9.0)]) is None


def test_refusals():
    curves = {"es": [(1, 8.0)], "en": [(2, 6.0)]}
    for forget, retain, said in (
        ("fr", "en", "no curve of forget category 'fr'; there are es, en"),
        ("es", [], "retain names no category"),
        ("es", "en", "no step"),
    ):
        with pytest.raises(DataError, match=said):
            trade_off(curves, forget, retain)
    with pytest.raises(DataError, match="at least one checkpoint"):
        retain_gap([], [TradeOff(1, 1.0, 1.0)])
