"""Metrics apart for each kind of row: rates, scores and log-probabilities, against one row at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import log_softmax

import gradsurgery as gs
from gradsurgery.adapters import Kinds, Quantile, Score
from gradsurgery.errors import ArtefactError, BatchError, DataError, PlanError
from gradsurgery.evaluation import mean_by_kind, mean_log_probability, token_log_probabilities
from tests.adapters.tiny import ROWS, adapted, batch, clear, flags, rows_of

QUICK = settings(max_examples=6, deadline=None)
NAMES = ("student", "teacher", "other")
KINDS = st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS).map(torch.tensor)


def test_means_by_hand() -> None:
    values, kinds = torch.tensor([1.0, 2.0, 6.0, torch.nan]), torch.tensor([0, 2, 0, 2])
    assert mean_by_kind(values, kinds) == {"0": 3.5, "2": 2.0}
    assert mean_by_kind(values, kinds == 2, ("no", "yes")) == {"no": 3.5, "yes": 2.0}
    # p(0) = 3/4 and p(1) = 1/4 everywhere; the first row has labels 0 and 1 after its first token, the second one has 1
    logits = torch.tensor([3.0, 1.0]).log().expand(2, 3, 2)
    labels = torch.tensor([[1, 0, 1], [0, -100, 1]])
    found = mean_log_probability(logits, labels, torch.tensor([0, 1]), ("student", "teacher"))
    assert found == pytest.approx({"student": math.log(3 / 16) / 2, "teacher": math.log(1 / 4)}, abs=1e-6)
    assert token_log_probabilities(logits, labels).isnan().tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("values", "kinds", "names", "message"),
    [
        (torch.ones(3), torch.ones(2).long(), None, "one for each row"),
        (torch.ones(3), torch.ones(3), None, "whole numbers"),
        (torch.ones(3), torch.tensor([0, 1, 2]), ("a", "b"), "names for 2 kinds"),
    ],
)
def test_kinds_that_do_not_fit(values: Tensor, kinds: Tensor, names: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mean_by_kind(values, kinds, names)
    with pytest.raises(DataError, match="do not go together"):
        token_log_probabilities(torch.ones(2, 3, 4), torch.ones(2, 4).long())


def one_by_one(adapter: Any, given_batch: dict[str, Tensor], kinds: Tensor) -> dict[str, float]:
    """Mean log-probability of a token by kind."""
    sums: dict[str, list[float]] = {}
    for k in range(ROWS):
        row = rows_of(given_batch, slice(k, k + 1))
        inputs = {name: value for name, value in row.items() if name != "labels"}
        with torch.no_grad():
            logp = log_softmax(adapter.model(**inputs).logits[0].double(), -1)
        for t in range(1, row["labels"].shape[1]):
            if (label := int(row["labels"][0, t])) != -100:
                sums.setdefault(NAMES[int(kinds[k])], []).append(float(logp[t - 1, label]))
    return {name: sum(found) / len(found) for name, found in sums.items()}


def by_kind(metrics: dict[str, float]) -> dict[str, float]:
    return {name: of for name, of in metrics.items() if name.startswith("quarantine/") and name.count("/") == 2}


@pytest.mark.parametrize("mode", ["route", "erase"])
@QUICK
@given(KINDS, flags())
def test_labels_and_log_probabilities(mode: Any, kinds: Tensor, flagged: Tensor) -> None:
    adapter, given_batch = adapted("llama", torch.float64, rank=3), batch()
    direction = gs.estimators.paired_direction(adapter.model, adapter, [(batch(2), batch(2, 1))], noise="keep")
    given_options: dict[str, Any] = {"direction": direction} if mode == "erase" else {}
    method = gs.methods.quarantine(adapter, mode, kinds=Kinds("kind", NAMES), **given_options)
    with gs.attach(method, adapter.host, torch.optim.SGD(adapter.parameters(), lr=0.0)) as surgery:
        surgery.backward({**given_batch, "flag": flagged, "kind": kinds})
        surgery.finish()
        found = surgery.metrics()
    expected = {f"quarantine/log_probability/{k}": v for k, v in one_by_one(adapter, given_batch, kinds).items()}
    if mode == "route":
        rates = mean_by_kind(flagged.expand(ROWS) if flagged.dim() == 1 else flagged, kinds, NAMES)
        expected |= {f"quarantine/flagged/{name}": rate for name, rate in rates.items()}
    assert by_kind(found) == pytest.approx(expected, abs=1e-6)


def test_a_host_that_owns_the_forward_may_erase_with_kinds() -> None:
    adapter = adapted("llama", rank=3)
    direction = gs.estimators.paired_direction(adapter.model, adapter, [(batch(2), batch(2, 1))], noise="keep")
    grads = []
    for kinds in (None, Kinds("kind", NAMES)):
        method = gs.methods.quarantine(adapter, "erase", direction=direction, kinds=kinds)
        with gs.attach(method, adapter.host, torch.optim.SGD(adapter.parameters(), lr=0.0)) as surgery:
            with surgery.running("train", batch()):
                adapter.host(**batch()).loss.backward()
            surgery.finish()
        kept = adapter.parameters_of("kept").items()
        grads.append({name: p.grad.clone() for name, p in kept if p.grad is not None})
        clear(adapter)
    assert grads[0].keys() == grads[1].keys() != set()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("by", ["sequence", "token"])
@QUICK
@given(KINDS, st.floats(0.2, 0.6))
def test_scores_are_the_rows_own(by: Any, kinds: Tensor, q: float) -> None:
    """In a batch, and one at a time; a kind that is gone from the next batch leaves no figures behind."""
    adapter, given_batch = adapted("llama", torch.float64, rank=3), batch()
    direction = gs.estimators.paired_direction(adapter.model, adapter, [(batch(2), batch(2, 1))], noise="keep")
    score = Score(direction, Quantile(q), by=by)
    method = gs.methods.quarantine(adapter, "absorb", None, score, kinds=Kinds("kind", NAMES))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    with gs.attach(method, adapter.host, optimizer) as surgery:
        surgery.backward({**given_batch, "kind": kinds})
        optimizer.step()
        found = surgery.metrics()
        scored = method.passes[0].under[0].gate["now"].scored  # type: ignore[attr-defined]
        optimizer.zero_grad()
        surgery.backward({**given_batch, "kind": torch.zeros_like(kinds)})
        optimizer.step()
        assert {name.rpartition("/")[2] for name in by_kind(surgery.metrics())} == {"student"}
    rates = mean_by_kind(scored, kinds, NAMES)
    assert {k: found[f"quarantine/flagged/{k}"] for k in rates} == pytest.approx(rates)
    if by == "sequence":
        together = gs.adapters.cosines(adapter, direction, given_batch)
        alone = [gs.adapters.cosines(adapter, direction, rows_of(given_batch, slice(k, k + 1))) for k in range(ROWS)]
        assert torch.allclose(torch.cat(alone), together, atol=1e-9)
        for name, mean in mean_by_kind(together, kinds, NAMES).items():
            assert found[f"quarantine/score/{name}"] == pytest.approx(mean, abs=1e-6)


def test_bad_input() -> None:
    adapter = adapted("llama", rank=3)
    with pytest.raises(PlanError, match="kinds"):
        gs.methods.quarantine(adapter, kinds="category")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="kinds"):
        gs.methods.quarantine(adapter, metrics=False, kinds=Kinds())
    with pytest.raises(PlanError, match="column"):
        Kinds(3)  # type: ignore[arg-type]
    given_batch = {**batch(), "flag": torch.ones(ROWS, dtype=torch.bool)}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    with gs.attach(gs.methods.quarantine(adapter, kinds=Kinds("kind")), adapter.host, optimizer) as surgery:
        for wrong in ({}, {"kind": torch.ones(ROWS)}, {"kind": torch.ones(ROWS, dtype=torch.bool)}):
            with pytest.raises(BatchError, match="whole numbers"):
                surgery.backward({**given_batch, **wrong})
    other = adapted("llama", rank=4)
    direction = gs.estimators.paired_direction(other.model, other, [(batch(2), batch(2, 1))], noise="keep")
    with pytest.raises(ArtefactError, match="coordinates"):
        gs.adapters.cosines(adapter, direction, batch())
