"""Scaling curves are found again from their own points; penalties by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.errors import DataError
from gradsurgery.evaluation import ScalingCurve, compute_penalty, fit_scaling_curve

CURVE = ScalingCurve(1.0, 8.0, 0.5, 0.0, (16.0, 256.0), 3)


def test_by_hand():
    """1 + 8 / sqrt(C): loss 2 needs C = 64, loss 3 C = 16, loss 1.25 C = 1024."""
    assert CURVE.loss(64.0) == 2.0
    for loss, equivalent, value, outside in (
        (2.0, 64.0, 0.5, False),
        (3.0, 16.0, 0.875, False),
        (1.25, 1024.0, -7.0, True),
    ):
        found = compute_penalty(CURVE, loss, 128.0)
        assert (found.equivalent, found.value) == (pytest.approx(equivalent), pytest.approx(value))
        assert found.extrapolated is outside


@settings(max_examples=40, deadline=None)
@given(
    a=st.floats(0.5, 3),
    b=st.floats(0.5, 3),
    alpha=st.floats(0.05, 1),
    unit=st.floats(1, 1e21),
    irreducible=st.booleans(),
    sizes=st.integers(4, 7),
)
def test_a_curve_is_found_again(a, b, alpha, unit, irreducible, sizes):
    a = a if irreducible else 0.0
    compute = [unit * 4**k for k in range(sizes)]
    losses = [a + b * (c / unit) ** -alpha for c in compute]
    found = fit_scaling_curve(compute, losses, irreducible=irreducible)
    assert found.residual < 1e-6 and found.points == sizes and found.bounds == (compute[0], compute[-1])
    assert [found.loss(c) for c in compute] == pytest.approx(losses, abs=1e-5)
    assert found.alpha == pytest.approx(alpha, rel=1e-2)
    middle = compute[1] * 2
    assert compute_penalty(found, a + b * (middle / unit) ** -alpha, compute[-1]).equivalent == pytest.approx(
        middle, rel=1e-2
    )


def test_least_squares_with_noise_beats_its_neighbours():
    compute = [1.0, 3.0, 10.0, 30.0, 100.0]
    losses = [5.0, 4.1, 3.55, 3.05, 2.9]
    found = fit_scaling_curve(compute, losses)

    def error(a, b, alpha):
        return math.sqrt(sum((a + b * c**-alpha - y) ** 2 for c, y in zip(compute, losses, strict=True)) / 5)

    assert found.residual == pytest.approx(error(found.a, found.b, found.alpha))
    for da, db, dalpha in ((1e-3, 0, 0), (-1e-3, 0, 0), (0, 1e-3, 0), (0, -1e-3, 0), (0, 0, 1e-3), (0, 0, -1e-3)):
        assert error(found.a + da, found.b + db, found.alpha + dalpha) > found.residual


def test_bounds_hold():
    """Losses that fall faster than any power law towards 0 would ask for a < 0."""
    found = fit_scaling_curve([1.0, 2.0, 4.0, 8.0], [4.0, 3.0, 2.0, 1.0])
    assert found.a == 0.0 and found.b > 0 and found.residual > 0.1


def test_refusals():
    for compute, losses, said in (
        ([1.0, 2.0], [2.0, 1.0], "3 parameters"),
        ([1.0, 1.0, 2.0], [2.0, 2.0, 1.0], "different compute"),
        ([1.0, 2.0, -4.0], [3.0, 2.0, 1.0], "positive"),
        ([1.0, 2.0, 4.0], [1.0, 2.0, 3.0], "do not fall"),
    ):
        with pytest.raises(DataError, match=said):
            fit_scaling_curve(compute, losses)
    with pytest.raises(DataError, match="irreducible 1"):
        compute_penalty(CURVE, 0.9, 1.0)
    with pytest.raises(DataError, match="compute=0"):
        compute_penalty(CURVE, 2.0, 0)
