"""Slots that live longer: kept for some steps, filled anew, refreshed from batches of their own, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, BatchError, PlanError, SlotError
from gradsurgery.surgery.checkpoint import load_state, save_state
from tests.surgery.tiny import batch, build, cut, gap, grads, weights


def reference_pass(**more: Any) -> gs.Pass:
    return gs.Pass("reference", stream="reference", into="protect", **more)


def method(**more: Any) -> gs.Method:
    return gs.Method([gs.Pass("main"), reference_pass(**more)], gradient=[gs.project()])


def rows(k: int) -> dict[str, Any]:
    return {**batch(seed=k), "reference": batch(seed=1000 + k)}


def gradient_of(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the plain loss on a batch."""
    held = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with_labels = type("Outputs", (), {"logits": model(given["input_ids"], given["attention_mask"]).logits})
    gs.losses.causal_lm(with_labels, given, {}).backward()
    out = grads(model)
    for n, p in model.named_parameters():
        p.grad = held[n]
    return out


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_a_kept_slot_serves_so_many_steps_and_is_then_an_error(every: int, keep: int, steps: int) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    filled: dict[str, Tensor] = {}
    age = 0
    with gs.attach(method(when=gs.every(every), keep=keep), model, optimizer) as surgery:
        for k in range(steps):
            if k % every == 0:
                filled, age = gradient_of(model, rows(k)["reference"]), 0
            surgery.backward(rows(k))
            if age >= keep:
                with pytest.raises(SlotError, match=r"'protect' was (filled in step|not filled)"):
                    optimizer.step()
                return
            assert gap(surgery.slots["protect"], filled) <= 1e-6
            optimizer.step()
            optimizer.zero_grad()
            age += 1


def test_the_error_of_a_stale_slot_says_when_it_was_filled_and_what_to_do() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.attach(method(when=gs.every(9), keep=2), model, optimizer) as surgery:
        for k in range(2):
            surgery.backward(rows(k))
            optimizer.step()
            optimizer.zero_grad()
        surgery.backward(rows(2))
        with pytest.raises(
            SlotError,
            match=r"'protect' was filled in step 0 and serves 2 steps; this is step 2.*surgery.refresh\('prot",
        ):
            optimizer.step()


def test_a_kept_slot_is_filled_anew_and_micro_batches_of_one_window_add_up() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gs.attach(method(when=gs.every(2), keep=2), model, optimizer) as surgery:
        for k in range(3):
            whole = batch(6, seed=k)
            parts = [{**batch(2, seed=k), "reference": cut(whole, 3 * j, 3 * j + 3)} for j in range(2)]
            items = surgery.count_items(parts)
            for part in parts:
                surgery.backward(part, num_items=items)
            wanted = gradient_of(model, batch(6, seed=k - k % 2))
            assert gap(surgery.slots["protect"], wanted) <= 1e-6
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_refreshed_slot_is_the_mean_gradient_over_the_batches_and_nothing_else_changes(micro: int) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.attach(method(when=gs.on_refresh(), keep=3), model, optimizer) as surgery:
        surgery.backward(rows(0))
        main, before = grads(model), surgery.metrics()
        whole = batch(6, seed=5)
        parts = [{"reference": cut(whole, k * 6 // micro, (k + 1) * 6 // micro)} for k in range(micro)]
        losses = surgery.refresh("protect", iter(parts))
        assert gap(surgery.slots["protect"], gradient_of(model, whole)) <= 1e-6
        assert gap(grads(model), main) == 0.0 and surgery.metrics() == before
        with torch.no_grad():
            given = type("Outputs", (), {"logits": model(whole["input_ids"], whole["attention_mask"]).logits})
            assert float(losses["reference"]) == pytest.approx(float(gs.losses.causal_lm(given, whole, {})), rel=1e-5)
        for k in range(3):  # serves three steps, then no more
            optimizer.step()
            optimizer.zero_grad()
            surgery.backward(rows(k))
        with pytest.raises(SlotError, match="serves 3 steps"):
            optimizer.step()
        surgery.refresh("protect", parts)
        optimizer.step()


def test_refresh_takes_the_losses_into_that_slot_alone() -> None:
    calls: list[str] = []

    def noted(name: str) -> Any:
        def loss(outputs: Any, given: Any, refs: Any) -> Tensor:
            calls.append(name)
            return gs.losses.causal_lm(outputs, given, refs)

        return loss

    both = gs.Pass("p", {"a": noted("a"), "b": noted("b")}, into={"a": "main", "b": "protect"})
    model = build()
    with gs.attach(gs.Method([both], gradient=[gs.project()]), model) as surgery:
        surgery.refresh("protect", [batch()])
        assert calls == ["b"]
        assert all(p.grad is None for p in model.parameters())
        assert gap(surgery.slots["protect"], gradient_of(model, batch())) <= 1e-6


def test_refresh_that_fails_leaves_the_slot_as_it_was() -> None:
    model = build()
    with gs.attach(method(when=gs.on_refresh(), keep=3), model) as surgery:
        surgery.refresh("protect", [rows(0)])
        before = {n: g.clone() for n, g in surgery.slots["protect"].items()}
        bad = {"reference": {**batch(), "labels": torch.ones(2)}}
        for batches, error, match in (([], BatchError, "no batches"), ([rows(1), bad], BatchError, "labels")):
            with pytest.raises(error, match=match):
                surgery.refresh("protect", batches)
            assert gap(surgery.slots["protect"], before) == 0.0
        for slot in ("main", "protct"):
            with pytest.raises(SlotError, match="is none of protect"):
                surgery.refresh(slot, [rows(0)])
        assert gap(surgery.slots["protect"], before) == 0.0


def test_a_skipped_step_spoils_what_it_filled_and_leaves_what_was_refreshed() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.attach(method(when=gs.every(2), keep=2), model, optimizer) as surgery:
        surgery.backward(rows(0))
        optimizer.zero_grad()  # a scaler skipped the step
        assert "protect" not in surgery.slots
        surgery.backward(rows(0))  # the schedule still stands at step 0
        assert gap(surgery.slots["protect"], gradient_of(model, rows(0)["reference"])) <= 1e-6
        optimizer.step()
        optimizer.zero_grad()
        surgery.backward(rows(1))
        optimizer.zero_grad()
        assert "protect" in surgery.slots  # of the step before, which was no part of what was skipped
    with gs.attach(method(when=gs.on_refresh(), keep=2), model, optimizer) as surgery:
        surgery.refresh("protect", [rows(0)])
        surgery.backward(rows(0))
        optimizer.zero_grad()
        assert "protect" in surgery.slots


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_continues_equally(stop: int, tmp_path: Path) -> None:
    def plan() -> gs.Method:
        passes = [gs.Pass("main"), reference_pass(when=gs.every(3), keep=3)]
        return gs.Method(passes, gradient=[gs.ema("protect", 0.7, into="mean"), gs.project(away_from="mean")])

    def train(surgery: gs.Surgery, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for k in steps:
            surgery.backward(rows(k))
            optimizer.step()
            optimizer.zero_grad()

    whole, model = build(), build()
    one = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    with gs.attach(plan(), whole, one) as surgery:
        train(surgery, one, range(7))
    two = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with gs.attach(plan(), model, two) as surgery:
        train(surgery, two, range(stop))
        save_state(surgery.state_dict(), tmp_path)
        if stop < 3:
            surgery.refresh("protect", [rows(9)])  # what is saved is not touched by what comes after
    with gs.attach(plan(), model, two) as surgery:
        surgery.load_state_dict(load_state(tmp_path))
        train(surgery, two, range(stop, 7))
    assert gap(weights(whole), weights(model)) == 0.0


def test_states_with_slots_of_another_method_are_refused(tmp_path: Path) -> None:
    model = build()
    with gs.attach(method(when=gs.on_refresh(), keep=3), model) as surgery:
        surgery.refresh("protect", [rows(0)])
        state = surgery.state_dict()
        for slots in ({"other": state["slots"]["protect"]}, {"protect": {"filled": 0, "grads": {"x": torch.ones(1)}}}):
            with pytest.raises(ArtefactError, match="does not fit"):
                surgery.load_state_dict({**state, "slots": slots})
        save_state(state, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["surgery.json", "surgery.safetensors"]


def test_passes_that_keep_what_cannot_be_kept_are_refused() -> None:
    with pytest.raises(PlanError, match="give the pass a slot of its own"):
        gs.Pass("p", keep=2)
    for keep in (0, -1, 1.5, True):
        with pytest.raises(PlanError, match="keep is a positive number"):
            gs.Pass("p", into="protect", keep=keep)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="passes keep slot 'protect' for 2 and for 3 steps"):
        gs.Method([gs.Pass("a", into="protect", keep=2), gs.Pass("b", into="protect", keep=3)])
    assert gs.Pass("a", into="protect", keep=2).describe()["keep"] == 2
    assert "kept for 2 steps" in gs.Method([gs.Pass("a", into="protect", keep=2)]).explain(build())
