from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.errors import DataError
from gradsurgery.evaluation.tiers import (
    corrupted_key,
    corrupted_keys,
    corrupted_weights,
    curve_rows,
    evaluate_tiers,
    partial_keys,
    score,
    wrong_key,
    wrong_keys,
)
from gradsurgery.evaluation.tiers.draws import joined, keyed_units
from gradsurgery.keys.lists import canonical, slots_of
from tests.evaluation.tiers import TEXT, dissected, keyed

KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"attention": "output", "mlp": "up", "attention_ratio": 0.1, "fraction": 0.15},
    "llama": {"mlp": "down", "fraction": 0.2},
    "mixtral": {"expert_ratio": 0.4, "attention_ratio": 0.2, "fraction": 0.5},
}


def between(key: gs.PermutationKey) -> Counter[object]:
    """Numbers of swaps by list and pair of layers."""
    return Counter((name, *sorted(s[0] for s in swap)) for name, found in key.lists.items() for swap in found)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.booleans(), st.integers(0, 2**32), st.floats(0, 1))
def test_other_keys_have_as_many_swaps_between_the_same_layers(kind: str, half: bool, seed: int, share: float) -> None:
    _, anatomy, key = keyed(kind, **(KINDS[kind] if half or kind == "mixtral" else {}), seed=seed)
    other = corrupted_key(key, anatomy, share, seed)
    other.validate(anatomy)  # bounds, no slot twice, equal shapes
    assert between(other) == between(key) and other.model == key.model
    assert other == corrupted_key(key, anatomy, share, seed)
    kept = sum(len(set(canonical(s)) & set(canonical(other.lists.get(n, ())))) for n, s in key.lists.items())
    assert kept >= len(key) - round(share * len(key))


def test_ends_of_the_scale() -> None:
    _, anatomy, key = keyed()
    assert corrupted_key(key, anatomy, 0.0) == key
    assert corrupted_key(key, anatomy, 1.0, 3) == wrong_key(key, anatomy, 3) != key
    assert wrong_key(key, anatomy, 3) != wrong_key(key, anatomy, 4)
    for share in (-0.1, 1.1, True):
        with pytest.raises(DataError, match="a share is a number from 0 to 1"):
            corrupted_key(key, anatomy, share)


def test_a_larger_share_replaces_what_a_smaller_one_does() -> None:
    _, anatomy, key = keyed(attention_ratio=0.0)
    kept = []
    for share in (0.2, 0.5, 0.8):
        found = corrupted_key(key, anatomy, share, 0)
        kept.append(set(canonical(found.mlp_cols)) & set(canonical(key.mlp_cols)))
    assert kept[0] > kept[1] > kept[2]


def test_wrong_keys_hit_right_slots_by_chance_only() -> None:
    """Slots of a layer are equally likely: 3 layers of 40 neurons, of which the key moves a known number."""
    _, anatomy, key = keyed(attention_ratio=0.0)
    right = {slot for _, slot, _ in slots_of(key.lists)}
    moved = Counter(layer for layer, _ in right)
    expected = sum(n * n / 40 for n in moved.values())
    hits = [len(right & {s for _, s, _ in slots_of(wrong_key(key, anatomy, k).lists)}) for k in range(300)]
    variance = sum(n * n / 40 * (40 - n) / 40 * (40 - n) / 39 for n in moved.values())  # hypergeometric
    assert abs(sum(hits) / 300 - expected) < 4 * (variance / 300) ** 0.5


def test_no_slot_is_left() -> None:
    _, anatomy = dissected("gpt2")
    key = gs.PermutationKey(mlp_cols=[[[0, i], [1, i]] for i in range(40)])
    assert wrong_key(key, anatomy) != key  # every slot is taken, in other pairs
    assert {s for _, s, _ in slots_of(wrong_key(key, anatomy).lists)} == {s for _, s, _ in slots_of(key.lists)}


def test_partial_keys_lead_from_c1_to_c2() -> None:
    model, anatomy, key = keyed()
    curve = partial_keys(model, key, anatomy, TEXT, shares=(0.0, 0.5, 1.0), subsets=3)
    tiers = evaluate_tiers(model, key, anatomy, TEXT)
    assert (curve["public"], curve["keyed"]) == (tiers["C1"], tiers["C2"])
    none, half, all_ = curve["points"]
    assert [at["draws"] for at in curve["points"]] == [1, 3, 1]
    for category in TEXT:
        assert none["loss"][category]["values"] == [tiers["C1"][category]["loss"]]
        assert all_["accuracy"][category]["values"] == [tiers["C2"][category]["accuracy"]]
        found = half["loss"][category]
        assert len(set(found["values"])) == 3 and found["std"] > 0
        assert found["low"] <= found["mean"] <= found["high"]


def test_corrupted_and_wrong_keys() -> None:
    model, anatomy, key = keyed()
    curve = corrupted_keys(model, key, anatomy, TEXT, shares=(0.0, 1.0), draws=2, seed=5)
    right, wrong = curve["points"]
    assert right["draws"] == 1 and right["loss"]["one"]["mean"] == curve["keyed"]["one"]["loss"]
    assert wrong["draws"] == 2
    assert wrong_keys(model, key, anatomy, TEXT, count=2, seed=5)["points"] == [wrong]
    for draws in (0, 1.5):
        with pytest.raises(DataError, match="draws a point"):
            corrupted_keys(model, key, anatomy, TEXT, draws=draws)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_corrupted_weights(kind: str) -> None:
    """Where all keyed units are zero, swapping them does nothing: C2 is C1, and both are the ablated model."""
    model, anatomy, key = keyed(kind)
    found = corrupted_weights(model, key, anatomy, TEXT, shares=(0.0, 0.5, 1.0), draws=2, reinit="zero")
    ablated = copy.deepcopy(model)
    gs.ablate_(ablated, joined(keyed_units(key, anatomy)))
    expected = score(ablated, TEXT)
    for tier, before in (("C1", "public"), ("C2", "keyed")):
        none, half, all_ = found[tier]["points"]
        assert [at["draws"] for at in found[tier]["points"]] == [1, 2, 1]
        for category in TEXT:
            assert none["loss"][category]["mean"] == found[tier][before][category]["loss"]  # type: ignore[literal-required]
            assert all_["loss"][category]["mean"] == pytest.approx(expected[category]["loss"], rel=1e-6)
        assert half["loss"]["one"]["std"] > 0
    drawn = corrupted_weights(model, key, anatomy, TEXT, shares=(1.0,), draws=2, reinit="normal")
    assert drawn["C2"]["points"][0]["loss"]["one"]["std"] > 0


def test_units_that_a_key_moves_are_its_region() -> None:
    for kind in ("gpt2", "llama"):
        _, anatomy, key = keyed(kind)
        units = keyed_units(key, anatomy)
        assert len(units) == 2 * len(key)
        assert joined(units) == key.region(anatomy)


def test_rows() -> None:
    model, anatomy, key = keyed()
    curve = partial_keys(model, key, anatomy, TEXT, shares=(0.5,), subsets=2)
    rows = curve_rows({"partial": curve}, "one")
    assert [row["share"] for row in rows] == ["C1", "C2", "0.5"] and rows[2]["draws"] == 2
    assert rows[0]["loss"] == curve["public"]["one"]["loss"]
