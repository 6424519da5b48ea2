from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.errors import DataError
from gradsurgery.evaluation.tiers import (
    gain_rows,
    recovery_by_gradient,
    recovery_by_magnitude,
    recovery_rows,
    relative_gains,
)
from gradsurgery.evaluation.tiers.draws import joined, keyed_units
from gradsurgery.evaluation.tiers.norms import gradients_of, unit_norms, weights_of
from gradsurgery.evaluation.tiers.recovery import auc, judged, relative
from gradsurgery.keys.slots import SlotTable
from tests.evaluation.tiers import IDS, bits, dissected, keyed, same


def scaled(model: nn.Module, region: gs.Region, factor: float) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, entries in region.entries.items():
            parameter = model.get_parameter(name)
            parameter.copy_(torch.where(entries.mask(), parameter * factor, parameter))
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_units_that_grew_give_themselves_away(kind: str) -> None:
    """A third of a layer's units at most: they stand out from its median."""
    model, anatomy = dissected(kind)
    neurons = [[[0, i], [1, i + 3]] for i in range(5)] + [[[1, 20 + i], [2, i]] for i in range(8)]
    key = gs.PermutationKey(attn_heads=[[[0, 0], [1, 1]]], mlp_cols=neurons)
    grown = recovery_by_magnitude(scaled(model, key.region(anatomy), 10.0), key, anatomy)
    assert list(grown) == ["attention", "mlp", "combined"]
    for rules in grown.values():
        best = rules["largest"]
        assert best["auc"] == best["accuracy"] == best["precision"] == best["recall"] == best["f1"] == 1.0
        assert rules["smallest"]["auc"] == 0.0
    assert grown["combined"]["largest"]["keyed"] == 2 * len(key)
    shrunk = recovery_by_magnitude(scaled(model, key.region(anatomy), 0.1), key, anatomy)
    assert {rules["smallest"]["auc"] for rules in shrunk.values()} == {1.0}


def test_both_ways_is_an_outlier() -> None:
    model, anatomy, key = keyed(fraction=0.1, attention_ratio=0.0)
    units = keyed_units(key, anatomy)
    half = scaled(scaled(model, joined(units[::2]), 3.0), joined(units[1::2]), 0.01)
    found = recovery_by_magnitude(half, key, anatomy)["mlp"]
    assert found["outlier"]["auc"] > 0.98 > 0.7 > max(found["largest"]["auc"], found["smallest"]["auc"])


def test_nothing_shows_in_a_fresh_model() -> None:
    """AUC is 1/2 up to the deviation of the Mann-Whitney statistic, on the mean of 40 keys."""
    model, anatomy = dissected("gpt2")
    found = []
    for seed in range(40):
        key = gs.PermutationKey.generate(anatomy, fraction=0.3, attention_ratio=0.0, seed=seed)
        found.append(recovery_by_magnitude(model, key, anatomy)["mlp"]["largest"])
    n, m = found[0]["keyed"], found[0]["units"] - found[0]["keyed"]
    deviation = math.sqrt((n + m + 1) / (12 * n * m))
    assert abs(np.mean([f["auc"] for f in found]) - 0.5) < 4 * deviation / math.sqrt(40)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_magnitudes_are_those_of_the_slices(kind: str) -> None:
    model, anatomy = dissected(kind)
    for places in SlotTable.of(anatomy).places.values():
        for place in places:
            whole = place.parent if place.parent is not None else place.group
            expected = []
            for unit in whole.units:
                total = 0.0
                for name, index in unit:
                    weight: Any = model.get_parameter(name).detach().double()
                    for dim, chosen in index.items():
                        weight = weight.index_select(dim, torch.tensor(chosen))
                    total += weight.square().sum().item()
                expected.append(total**0.5)
            np.testing.assert_allclose(unit_norms(weights_of(model), place), expected, rtol=1e-6)


def test_units_that_alone_get_a_gradient_give_themselves_away() -> None:
    """Public neurons that are zero get no gradient; the keyed ones are all that moves. A fresh model shows nothing."""
    model, anatomy, key = keyed(attention_ratio=0.0)
    n, m = 2 * len(key), 120 - 2 * len(key)
    fresh = recovery_by_gradient(model, key, anatomy, IDS)["mlp"]["largest"]["auc"]
    assert abs(fresh - 0.5) < 4 * math.sqrt((n + m + 1) / (12 * n * m))
    dead = copy.deepcopy(model)
    gs.ablate_(dead, anatomy.neurons - joined(keyed_units(key, anatomy)))  # type: ignore[arg-type]
    dead.requires_grad_(False)
    before = bits(dead)
    found = recovery_by_gradient(dead, key, anatomy, IDS, batch_size=4)["mlp"]["largest"]
    assert found["auc"] == found["recall"] == 1.0
    assert same(before, dead) and not any(p.requires_grad or p.grad is not None for p in dead.parameters())
    with pytest.raises(DataError, match="nothing to predict"):
        recovery_by_gradient(model, key, anatomy, IDS[:, :1])


def test_gradients_are_those_of_the_mean_over_tokens() -> None:
    model: Any = copy.deepcopy(dissected("llama")[0])
    padded = IDS.clone()
    padded[0, 8:] = -100
    found = gradients_of(model, padded, batch_size=4)
    mask = (padded >= 0).long()
    model(input_ids=padded.clamp(min=0), attention_mask=mask, labels=padded).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_dead_units_are_the_smallest() -> None:
    assert relative(np.array([0.0, 2.0, 2.0, 4.0])).tolist() == pytest.approx([-math.inf, 0.0, 0.0, math.log(2)])
    assert relative(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_scores_by_hand() -> None:
    truth = np.array([True, False, True, False, False])
    found = judged(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), truth)
    assert found["precision"] == found["recall"] == found["f1"] == 0.5 and found["accuracy"] == 0.6
    assert found["auc"] == pytest.approx(5 / 6)
    assert auc(np.zeros(5), truth) == 0.5
    assert math.isnan(auc(np.zeros(2), np.array([True, True])))


def test_rows() -> None:
    model, anatomy, key = keyed()
    rows = recovery_rows(recovery_by_magnitude(model, key, anatomy))
    assert len(rows) == 9 and rows[0]["kind"] == "attention" and "auc" in rows[0]


def test_gains() -> None:
    attacks: Any = {"random key": 4.9, "half": [4.0, 4.4], "worse": 6.0}
    assert relative_gains(5.0, 3.0, attacks) == pytest.approx({"random key": 0.05, "half": 0.4, "worse": -0.5})
    rows = gain_rows(5.0, 3.0, attacks)
    assert [row["attack"] for row in rows] == ["no attack", "the key", "random key", "half", "worse"]
    assert [row["loss"] for row in rows] == pytest.approx([5.0, 3.0, 4.9, 4.2, 6.0])
    for keyed_loss in (5.0, 6.0, math.nan):
        with pytest.raises(DataError, match="no gain"):
            relative_gains(5.0, keyed_loss, attacks)
