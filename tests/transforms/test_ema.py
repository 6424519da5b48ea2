"""Running means of slots against the recursion written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError, SlotError
from gradsurgery.surgery.slots import Slots
from gradsurgery.transforms.stages import StepContext
from tests.transforms.vectors import SHAPES, Holder, draw


@given(
    st.integers(0, 10**6), st.floats(0.0, 0.99), st.sampled_from([None, "protect", "mean", "main"]), st.integers(1, 6),
    st.data(),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_the_mean_is_the_recursion_and_missing_gradients_are_zeros(
    seed: int, decay: float, into: Any, steps: int, data: Any
) -> None:
    model = Holder(dtype=torch.float64)
    transform = gs.ema("protect", decay, into)
    state: dict[str, Any] = transform.init(ParameterSpace.of(model))
    slots = Slots()
    wanted: dict[str, Any] = {}
    for k in range(steps):
        missing = data.draw(st.sets(st.sampled_from(sorted(SHAPES)), max_size=len(SHAPES) - 1))
        given = {n: v for n, v in draw(seed + k, [k] * len(SHAPES), torch.float64).items() if n not in missing}
        for name in SHAPES:
            new = given.get(name, torch.zeros(SHAPES[name], dtype=torch.float64))
            wanted[name] = new if not k else decay * wanted[name] + (1 - decay) * new
        slots.put("protect", {n: v.clone() for n, v in given.items()})
        transform.apply(StepContext.of(model, slots=slots, step=k), state)
        held = {n: p.grad for n, p in model.named_parameters()} if into == "main" else slots[into or "protect"]
        for name in SHAPES:
            found = held.get(name)
            scale = 10.0**k
            if found is None:
                assert not wanted[name].any()
            else:
                assert torch.allclose(found, wanted[name], rtol=1e-12, atol=1e-12 * scale)
        if into not in (None, "protect"):
            assert all(torch.equal(slots["protect"][n], given[n]) for n in given)
        slots.next_window(k + 1)


def test_a_mean_in_fp32_follows_small_changes_of_bf16_gradients() -> None:
    model = Holder(dtype=torch.bfloat16)
    state: dict[str, Any] = {}
    transform, slots = gs.ema("protect", 0.999), Slots()
    for k in range(400):
        slots.put("protect", {n: torch.full(s, 1.0 if k else 0.0).bfloat16() for n, s in SHAPES.items()})
        transform.apply(StepContext.of(model, slots=slots, step=k), state)
        slots.next_window(k + 1)
    assert float(state["a.weight"][0, 0]) == pytest.approx(1 - 0.999**399, rel=1e-4)


def test_bad_means_are_refused() -> None:
    for decay in (1.0, -0.1, float("nan"), "0.5", True):
        with pytest.raises(PlanError, match="decay lies from 0 up to 1"):
            gs.ema("protect", decay)  # type: ignore[arg-type]
    for slots in (("",), ("a", 0.5, "")):
        with pytest.raises(PlanError, match="names of slots"):
            gs.ema(*slots)  # type: ignore[arg-type]
    with pytest.raises(SlotError, match="was not filled"):
        gs.ema("protect").apply(StepContext.of(Holder(), slots=Slots()), {})
