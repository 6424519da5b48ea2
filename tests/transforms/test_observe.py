"""Observers: what they say of a step against its weights before and after; they change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError
from tests.surgery.tiny import anatomy, batch, build, gap, weights
from tests.transforms.test_project_update import OPTIMIZERS, method, vector


def modules(names: Any) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(name.rpartition(".")[0], []).append(name)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
def test_the_leak_is_the_cosine_of_the_delta_and_changes_nothing(dtype: torch.dtype, first: bool) -> None:
    stock, model = build().to(dtype), build().to(dtype)
    updates = [gs.leak(per_module=True), gs.project(at="update", metrics="global")]
    one, two = (OPTIMIZERS["adamw"](m.parameters()) for m in (stock, model))
    plain = gs.attach(method([updates[1]]), stock, one)
    with gs.attach(method(updates if first else updates[::-1]), model, two) as surgery:
        for k in range(3):
            before = weights(model)
            plain.backward(batch(seed=k))
            surgery.backward(batch(seed=k))
            r = {n: g.clone() for n, g in surgery.slots["protect"].items()}
            for optimizer in (one, two):
                optimizer.step()
            delta = {n: p.detach().double() - before[n].double() for n, p in model.named_parameters()}
            found = surgery.metrics()
            for place, names in {"": list(r), **{f"/module/{m}": n for m, n in modules(r).items()}}.items():
                x, y = vector(delta, names), vector(r, names)
                wanted = float(x @ y / (x.norm() * y.norm()).clamp(min=1e-300))
                assert found[f"leak/protect{place}"] == pytest.approx(wanted, abs=1e-9)
            for optimizer in (one, two):
                optimizer.zero_grad()
    assert gap(weights(stock), weights(model)) == 0.0


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-3), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("part", [False, True])
def test_the_changed_fraction_counts_entries_that_moved(dtype: torch.dtype, rate: float, part: bool) -> None:
    model = build().to(dtype)
    region = anatomy().neurons[:, :9] if part else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    observer = gs.changed_fraction(region, per_module=True)
    with gs.attach(gs.Method([gs.Pass("p")], update=[observer]), model, optimizer) as surgery:
        before = weights(model)
        surgery.backward(batch())
        optimizer.step()
        masks = {n: region.of(n).mask() if region is not None else torch.ones(p.shape).bool()
                 for n, p in model.named_parameters()}  # fmt: skip
        changed = {n: int((p.detach() != before[n])[masks[n]].sum()) for n, p in model.named_parameters()}
        found = surgery.metrics()
        total = sum(int(m.sum()) for m in masks.values())
        assert found["changed_fraction"] == pytest.approx(sum(changed.values()) / total)
        for module, names in modules(n for n in masks if masks[n].any()).items():
            share = sum(changed[n] for n in names) / sum(int(masks[n].sum()) for n in names)
            assert found[f"changed_fraction/module/{module}"] == pytest.approx(share)
    if rate == 1e-5:
        assert found["changed_fraction"] < 0.5  # bf16 stands still, silently


def test_observers_look_at_every_nth_step_alone() -> None:
    model = build()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with gs.attach(method([gs.leak(every=3), gs.changed_fraction(every=2)]), model, optimizer) as surgery:
        seen = []
        for k in range(5):
            surgery.backward(batch(seed=k))
            surgery._stepper.metrics.clear()
            optimizer.step()
            optimizer.zero_grad()
            seen.append({name for name in surgery.metrics() if not name.startswith("loss")})
        leaks = [k for k in range(5) if "leak/protect" in seen[k]]
        fractions = [k for k in range(5) if "changed_fraction" in seen[k]]
        assert (leaks, fractions) == ([0, 3], [0, 2, 4])


def test_bad_observers_are_refused() -> None:
    for every in (0, -1, 1.5, True):
        for make in (gs.leak, gs.changed_fraction):
            with pytest.raises(PlanError, match="every is a positive number"):
                make(every=every)  # type: ignore[arg-type]
    for slot in ("main", "", 3):
        with pytest.raises(PlanError, match="away_from is the name of a slot"):
            gs.leak(slot)  # type: ignore[arg-type]
    region = gs.region(build(), "*mlp*")
    with pytest.raises(SelectionError, match="empty"):
        gs.changed_fraction(region - region)
