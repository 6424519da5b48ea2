"""Aggregation against gradients concatenated in fp64, and weightings against their definitions."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import PlanError, SlotError
from gradsurgery.transforms.weightings import NAMED, mgda
from tests.surgery.tiny import anatomy, batch, build, gap, grads
from tests.transforms.vectors import SHAPES, Holder, blocks_of, draw, flat, run

SEEDS = st.integers(0, 10**6)
EXPONENTS = st.tuples(*[st.integers(-6, 6)] * len(SHAPES))
(WHOLE,) = blocks_of("global")


def tasks(seed: int, count: int, exponents: Any = None) -> dict[str, Any]:
    return {f"t{k}": draw(seed + k, exponents or [0] * len(SHAPES), torch.float32) for k in range(count)}


def stacked(slots: dict[str, Any]) -> Tensor:
    """``[tasks, entries]``, fp64."""
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return torch.stack([flat({**zeros, **slot}, WHOLE) for slot in slots.values()])


def pcgrad_slowly(vectors: Tensor, seed: int, step: int) -> Tensor:
    """Algorithm 1 of Yu et al. 2020 on the vectors themselves."""
    draws = random.Random(f"{seed}/{step}")
    projected = vectors.clone()
    for i in range(len(vectors)):
        others = [j for j in range(len(vectors)) if j != i]
        draws.shuffle(others)
        for j in others:
            along = projected[i] @ vectors[j]
            if along < 0:
                projected[i] -= along / (vectors[j] @ vectors[j]) * vectors[j]
    return projected.sum(0)


@given(SEEDS, st.integers(1, 4), st.sampled_from(["sum", "mean", "pcgrad", "mgda"]), EXPONENTS, st.data())
@settings(max_examples=60, deadline=None)
def test_the_sum_is_that_of_concatenated_gradients(seed: int, count: int, name: str, exponents: Any, data: Any) -> None:
    slots = tasks(seed, count, exponents)
    for slot in slots.values():  # entries that a task has no gradient for
        for missing in data.draw(st.sets(st.sampled_from(sorted(SHAPES)), max_size=2)):
            del slot[missing]
    vectors = stacked(slots)
    main, others = slots.pop("t0"), slots
    with_main = data.draw(st.booleans())
    if with_main:
        found, context = run(gs.aggregate(name), main, others)
    else:
        found, context = run(gs.aggregate(name, slots=["t0", *others]), {}, {"t0": main, **others})
    weights = NAMED[name](vectors @ vectors.T)
    wanted = pcgrad_slowly(vectors, 0, 0) if name == "pcgrad" else weights @ vectors
    assert (stacked({"main": found})[0] - wanted).norm() <= 2e-6 * vectors.norm(dim=1).sum()
    for slot, grads_ in ({} if with_main else {"t0": main, **others}).items():
        assert all(torch.equal(context.slots[slot][n], g) for n, g in grads_.items())


@given(SEEDS, st.integers(2, 5), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_pcgrad_on_the_gram_matrix_is_pcgrad_on_the_gradients(seed: int, count: int, step: int) -> None:
    vectors = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = gs.PCGrad(seed)(vectors @ vectors.T, step=step) @ vectors
    assert torch.allclose(found, pcgrad_slowly(vectors, seed, step), atol=1e-9)


@given(SEEDS, st.integers(2, 5), st.integers(1, 7), st.integers(-9, 9))
@settings(max_examples=60, deadline=None)
def test_mgda_is_the_shortest_vector_of_the_hull(seed: int, count: int, size: int, exponent: int) -> None:
    vectors = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors *= 10.0**exponent
    weights = mgda(vectors @ vectors.T)
    assert (weights >= -1e-12).all() and float(weights.sum()) == pytest.approx(1.0)
    shortest = weights @ vectors
    # optimal: no vertex lies on the near side of the hyperplane through it
    slack = vectors @ shortest - shortest @ shortest
    assert (slack >= -1e-7 * float(vectors.square().sum(1).max())).all()
    for first, second in itertools.combinations(range(count), 2):
        for share in torch.linspace(0, 1, 5).tolist():
            other = share * vectors[first] + (1 - share) * vectors[second]
            assert shortest.norm() <= other.norm() + 1e-7 * vectors.norm()


def test_mgda_of_gradients_that_vanish_or_are_equal() -> None:
    for gram in (torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(3, 3), torch.ones(3, 3)):
        weights = mgda(gram.double())
        assert float(weights.sum()) == pytest.approx(1.0) and (weights >= 0).all()


def test_a_function_gets_the_gram_matrix_and_its_weights_are_in_the_metrics() -> None:
    seen = []

    def weighting(gram: Tensor) -> Tensor:
        seen.append(gram)
        return torch.tensor([0.5, -2.0])

    slots = tasks(3, 2)
    vectors = stacked(slots)
    found, context = run(gs.aggregate(weighting, slots=["t0", "t1"], into="combined"), {}, slots)
    assert not found and seen[0].dtype == torch.float64
    assert torch.allclose(seen[0], vectors @ vectors.T, rtol=1e-6)
    wanted = torch.tensor([0.5, -2.0], dtype=torch.float64) @ vectors
    assert torch.allclose(stacked({"c": context.slots["combined"]})[0], wanted, atol=1e-5)
    assert context.metrics["aggregate/t1"] == -2.0


def test_orders_of_pcgrad_differ_by_step_and_are_drawn_anew_from_seed_and_step() -> None:
    gram = torch.tensor([[1.0, -0.5, -0.4], [-0.5, 1.0, -0.3], [-0.4, -0.3, 1.0]]).double()
    rows = [tuple(gs.PCGrad(1)(gram, step=k).tolist()) for k in range(20)]
    assert rows == [tuple(gs.PCGrad(1)(gram, step=k).tolist()) for k in range(20)]
    assert len(set(rows)) > 1 and rows != [tuple(gs.PCGrad(2)(gram, step=k).tolist()) for k in range(20)]


def test_tasks_in_a_surgery_with_rows_that_flag_nobody_and_frozen_entries() -> None:
    model = build()
    passes = [gs.Pass("forget", rows="forget", into="a"), gs.Pass("retain", rows="retain", into="b")]
    frozen = anatomy().neurons[:, :9]
    method = gs.Method(passes, gradient=[gs.aggregate("pcgrad")], update=[gs.freeze(frozen)])
    nobody = {**batch(), "forget": torch.zeros(6).bool()}
    for rows in (batch(), nobody):
        with gs.attach(method, model) as surgery:
            surgery.backward(rows)
            slots = {s: {n: g.clone() for n, g in v.items()} for s, v in surgery.slots.items()}
            surgery.finish()
            found = grads(model)
        masks = {n: ~frozen.of(n).mask() for n in found}
        vectors = torch.stack([
            torch.cat([(s.get(n, torch.zeros_like(g)) * masks[n]).double().reshape(-1) for n, g in found.items()])
            for s in slots.values()
        ])  # fmt: skip
        wanted = pcgrad_slowly(vectors, 0, 0)
        together = torch.cat([g.double().reshape(-1) for g in found.values()])
        assert (together - wanted).norm() <= 2e-6 * vectors.norm()
        model.zero_grad()


@pytest.mark.parametrize("weighting", [gs.PCGrad(3), "mgda"])
def test_main_is_reused_in_place(weighting: Any) -> None:
    g, other = draw(0, [0] * len(SHAPES), torch.float32), draw(1, [0] * len(SHAPES), torch.float32)
    model = Holder()
    for name, p in model.named_parameters():
        p.grad = g[name]
    places = {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.grad is not None}
    from gradsurgery.surgery.slots import Slots
    from gradsurgery.transforms.stages import StepContext

    slots = Slots()
    slots.put("other", other)
    gs.aggregate(weighting).apply(StepContext.of(model, slots=slots), {})
    assert places == {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.grad is not None}


def test_bad_weightings_and_slots_are_refused() -> None:
    for bad in ("cagrad", 3.0):
        with pytest.raises(PlanError, match="aggregate"):
            gs.aggregate(bad)  # type: ignore[arg-type]
    for slots in ("main", [], ["a", "a"]):
        with pytest.raises(PlanError, match="slots"):
            gs.aggregate(slots=slots)
    with pytest.raises(SlotError, match="no slot was filled"):
        run(gs.aggregate(), {}, {})
    for weights in ([1.0], [1.0, float("nan")], [1.0, 2.0, 3.0]):

        def weighting(gram: Tensor, weights: list[float] = weights) -> Tensor:
            return torch.tensor(weights)

        with pytest.raises(SlotError, match="must be 2 finite numbers"):
            run(gs.aggregate(weighting), {}, tasks(0, 2))
    given = tasks(0, 2)
    given["t1"]["c.weight"][0, 0] = torch.inf
    with pytest.raises(SlotError, match=r"slot 't1' holds nan or inf in 'c.weight'"):
        run(gs.aggregate(), {}, given)


@pytest.mark.parametrize("name", ["UPGradWeighting", "PCGradWeighting", "CAGradWeighting", "AlignedMTLWeighting"])
def test_weightings_of_torchjd_plug_in(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    weighting = getattr(aggregation, name, None)
    if weighting is None:
        pytest.skip(f"this release of torchjd has no {name}")
    slots = tasks(5, 3)
    vectors = stacked(slots)
    try:
        instance = weighting() if name != "CAGradWeighting" else weighting(c=0.5)
    except ImportError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    wanted = instance(vectors @ vectors.T)
    torch.manual_seed(0)
    found, _ = run(gs.aggregate(instance), {}, slots)
    assert (stacked({"m": found})[0] - wanted @ vectors).norm() <= 1e-5 * vectors.norm()


def test_aggregate_equals_the_stock_gradient_of_the_summed_loss() -> None:
    model, stock = build(), build()
    passes = [gs.Pass("forget", rows="forget", into="a"), gs.Pass("retain", rows="retain", into="b")]
    with gs.attach(gs.Method(passes, gradient=[gs.aggregate("sum")]), model) as surgery:
        surgery.backward(batch())
        surgery.finish()
        assert surgery.metrics()["aggregate/a"] == 1.0
    with gs.attach(gs.Method([gs.Pass("forget", rows="forget"), gs.Pass("retain", rows="retain")]), stock) as surgery:
        surgery.backward(batch())
    assert gap(grads(model), grads(stock)) <= 1e-7
