import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsurgery.data import Noise, label_rows
from gradsurgery.errors import DataError

CATEGORIES = ["bio"] * 40 + ["chem"] * 60 + ["art"] * 100
RATES = st.floats(0, 1)


def counts(labels, column):
    flags = getattr(labels, column)
    return {"bio": int(flags[:40].sum()), "chem": int(flags[40:100].sum()), "art": int(flags[100:].sum())}


def label(**options):
    return label_rows(CATEGORIES, forget="bio", **{"adjacent": "chem", **options})


def test_without_noise_every_forget_row_and_every_retain_row_is_labelled():
    assert counts(label(), "forget") == {"bio": 40, "chem": 0, "art": 0}
    assert counts(label(), "retain") == {"bio": 0, "chem": 0, "art": 100}


def test_recall_and_precision_by_hand():
    """P = 40: recall 0.75 finds TP = 30; precision 0.6 then means 30 of 50 are right, so FP = 20."""
    assert Noise(recall=0.75, precision=0.6).counts(40, 160) == (30, 20)
    flagged = counts(label(noise=Noise(recall=0.75, precision=0.6)), "forget")
    assert flagged["bio"] == 30
    assert flagged["chem"] + flagged["art"] == 20


def test_true_and_false_positive_rate_by_hand():
    """P = 40, N = 160: tpr 0.9 finds 36; fpr 0.05 mistakes 8 of the *negatives* (not 0.05 * 36 = 2)."""
    assert Noise(tpr=0.9, fpr=0.05).counts(40, 160) == (36, 8)
    flagged = counts(label(noise=Noise(tpr=0.9, fpr=0.05)), "forget")
    assert flagged["bio"] == 36
    assert flagged["chem"] + flagged["art"] == 8


def test_false_positives_come_from_where_one_says():
    noise = Noise(tpr=1.0, fpr=0.5)
    assert counts(label(noise=noise, false_positives="chem"), "forget") == {"bio": 40, "chem": 30, "art": 0}
    assert counts(label(noise=noise, false_positives=["art"]), "forget") == {"bio": 40, "chem": 0, "art": 50}
    assert counts(label(noise=noise), "forget")["art"] > 0  # by default from every other category


def test_retain_shares_by_hand():
    labels = label(forget_retain=0.1, adjacent_retain=0.5, retain_retain=0.25)
    assert counts(labels, "forget") == {"bio": 36, "chem": 0, "art": 0}
    assert counts(labels, "retain") == {"bio": 4, "chem": 30, "art": 25}


def test_undiscovered_rows_carry_no_label():
    labels = label(noise=Noise(recall=0.9), forget_retain=0.5)
    assert counts(labels, "forget")["bio"] == 18
    assert counts(labels, "retain")["bio"] == 18  # of the 36 that were found


@given(st.lists(st.sampled_from("abc"), min_size=1), RATES, RATES, RATES, RATES, RATES, st.integers(0, 9))
def test_counts_hold_and_no_row_carries_both(letters, tpr, fpr, forget_retain, adjacent_retain, retain_retain, seed):
    categories = [*letters, "a", "b"]
    shares = {"forget_retain": forget_retain, "adjacent_retain": adjacent_retain, "retain_retain": retain_retain}
    noise = Noise(tpr=tpr, fpr=fpr)
    labels, again = (
        label_rows(categories, forget="a", adjacent="b", noise=noise, seed=seed, **shares) for _ in range(2)
    )
    assert (labels.forget == again.forget).all() and (labels.retain == again.retain).all()
    assert not (labels.forget & labels.retain).any()
    positives = categories.count("a")
    rows = list(zip(categories, labels.forget.tolist(), labels.retain.tolist(), strict=True))
    found = sum(forgotten or retained for category, forgotten, retained in rows if category == "a")
    mistaken = sum(forgotten for category, forgotten, _ in rows if category != "a")
    assert abs(found - tpr * positives) <= 0.5 + 1e-9
    assert abs(mistaken - fpr * (len(categories) - positives)) <= 0.5 + 1e-9


def test_seeds_matter():
    noise = Noise(recall=0.5)
    assert (label(noise=noise, seed=1).forget != label(noise=noise, seed=2).forget).any()


@pytest.mark.parametrize("name", ["recall", "precision", "tpr", "fpr"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_rates_are_rates(name, value):
    with pytest.raises(DataError, match=f"{name}=.* is no rate"):
        Noise(**{name: value})


def test_contradictions_are_refused():
    with pytest.raises(DataError, match="precision=0 would need infinitely many"):
        Noise(precision=0)
    with pytest.raises(DataError, match="given twice"):
        Noise(recall=0.5, fpr=0.1)
    with pytest.raises(DataError, match="asks for 360 false positives, but only 160 rows"):
        label(noise=Noise(recall=1.0, precision=0.1))
    with pytest.raises(DataError, match="retain_retain=2"):
        label(retain_retain=2)
    with pytest.raises(DataError, match="no row has category music; there are art, bio, chem"):
        label(adjacent="music")
    with pytest.raises(DataError, match="bio is forget and cannot be adjacent"):
        label(adjacent="bio")
    with pytest.raises(DataError, match="names no category"):
        label_rows(CATEGORIES, forget=())
