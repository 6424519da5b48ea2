"""Rates by hand, conversions forth and back, and labels that have the rates that were asked for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.data import Noise, label_rows
from gradsurgery.errors import DataError
from gradsurgery.evaluation import DetectorRates


def test_by_hand():
    """Of 80 forget and 1,000 other documents, 60 and 20 carry the label."""
    rates = DetectorRates(60, 20, 80, 1000)
    assert (rates.tpr, rates.recall, rates.fpr, rates.precision) == (0.75, 0.75, 0.02, 0.75)
    assert rates.undiscovered == 0.25
    assert rates.contamination == 20 / 1000  # 20 missed among 20 + 980 that a filter keeps
    assert math.isnan(DetectorRates(0, 0, 0, 5).tpr) and math.isnan(DetectorRates(0, 0, 5, 5).precision)


@settings(max_examples=100, deadline=None)
@given(
    tpr=st.floats(0.01, 1),
    fpr=st.floats(0, 1),
    positives=st.integers(1, 10**6),
    negatives=st.integers(1, 10**6),
)
def test_conversions_are_inverse(tpr, fpr, positives, negatives):
    rates = DetectorRates.from_rates(tpr, fpr, positives, negatives)
    back = DetectorRates.from_precision_recall(rates.precision, rates.recall, positives, negatives + 1e-3)
    assert (back.tpr, back.false_positives) == (pytest.approx(tpr), pytest.approx(rates.false_positives, abs=1e-6))


@settings(max_examples=60, deadline=None)
@given(
    tpr=st.floats(0, 1),
    fpr=st.floats(0, 1),
    counts=st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200)),
    seed=st.integers(0, 1000),
)
def test_drawn_labels_have_the_rates_over_all_other_documents(tpr, fpr, counts, seed):
    names = [name for name, n in zip(("forget", "adjacent", "retain"), counts, strict=True) for _ in range(n)]
    labels = label_rows(names, forget="forget", adjacent="adjacent", noise=Noise(tpr=tpr, fpr=fpr), seed=seed)
    truth = torch.tensor([name == "forget" for name in names])
    rates = DetectorRates.of_labels(labels.forget, truth)
    assert abs(rates.tpr - tpr) <= 0.5 / counts[0] + 1e-9  # counts are whole numbers
    assert abs(rates.fpr - fpr) <= 0.5 / (counts[1] + counts[2]) + 1e-9


def test_false_positives_fall_on_adjacent_and_retain_alike():
    names = ["forget"] * 100 + ["adjacent"] * 3000 + ["retain"] * 9000
    labels = label_rows(names, forget="forget", adjacent="adjacent", noise=Noise(tpr=1.0, fpr=0.2), seed=0)
    adjacent, retain = labels.forget[100:3100].float().mean().item(), labels.forget[3100:].float().mean().item()
    assert adjacent == pytest.approx(0.2, abs=0.03) and retain == pytest.approx(0.2, abs=0.02)


def test_refusals():
    for call, said in (
        (lambda: DetectorRates(5, 0, 4, 4), "cannot be"),
        (lambda: DetectorRates.from_rates(1.1, 0, 4, 4), "tpr=1.1"),
        (lambda: DetectorRates.from_rates(1, float("nan"), 4, 4), "fpr=nan"),
        (lambda: DetectorRates.from_precision_recall(0, 1, 4, 4), "precision=0"),
        (lambda: DetectorRates.from_precision_recall(0.1, 1, 40, 4), "360 false positives among 4"),
        (lambda: DetectorRates.of_labels(torch.tensor([1, 0]), [True, False]), "bool"),
        (lambda: DetectorRates.of_labels([True], [True, False]), "bool"),
    ):
        with pytest.raises(DataError, match=said):
            call()
