"""Projection inside a surgery: accumulation, frozen entries, scalers, hosts, and what a plan refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import PlanError, SlotError
from tests.surgery.tiny import anatomy, batch, build, cut, gap, grads, weights
from tests.transforms.vectors import project_slowly


def size(outputs: Any, rows: Any, refs: Any) -> Tensor:
    """A second loss over the same forward: how large the logits are, where there are labels."""
    counted = rows["labels"][:, 1:] != -100
    squares = outputs.logits[:, :-1].float().square().mean(-1)
    return squares.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


BOTH = gs.Pass("both", {"ce": gs.losses.causal_lm, "size": size}, into={"ce": "main", "size": "protect"})


def flat(named: dict[str, Tensor], names: Any = None, masks: Any = None) -> Tensor:
    names = list(named) if names is None else names
    parts = [named[n].double() * (masks[n] if masks else 1.0) for n in names]
    return torch.cat([p.reshape(-1) for p in parts])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def slots_of(model: Any, passes: list[gs.Pass], rows: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What the passes fill, before any stage."""
    with gs.attach(gs.Method(passes), model) as surgery:
        surgery.backward(rows)
        found = {"main": grads(model), **{s: {n: g.clone() for n, g in v.items()} for s, v in surgery.slots.items()}}
    model.zero_grad()
    return found


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.sampled_from(["global", "module", "tensor", "row"]),
    st.sampled_from(["both", "conflict", "agreement"]), st.sampled_from(["llama", "gpt_neo"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_micro_batches_are_projected_as_one_batch(seed: int, micro: int, scope: Any, remove: Any, kind: str) -> None:
    """The sum is projected, not its terms: the same micro-batches, without the stage, give the slots to project."""
    whole = batch(6, seed=seed)
    parts = [cut(whole, k * 6 // micro, (k + 1) * 6 // micro) for k in range(micro)]
    found = []
    for gradient in ([], [gs.project(scope=scope, remove=remove)]):
        model = build(kind)
        with gs.attach(gs.Method([BOTH], gradient=gradient), model) as surgery:
            items = surgery.count_items(parts)
            for part in parts:
                surgery.backward(part, num_items=items)
            surgery.finish()
            found.append((grads(model), {n: g.clone() for n, g in surgery.slots["protect"].items()}))
    (g, r), (left, same) = found
    assert gap(r, same) == 0.0
    blocks: dict[Any, list[Any]] = {}
    for n in g:
        rows = range(len(g[n])) if scope == "row" and g[n].dim() > 1 else [...]
        for k in rows:
            label = {"global": "", "module": n.rpartition(".")[0]}.get(scope, (n, k))
            blocks.setdefault(label, []).append((n, k))
    for block in blocks.values():
        x, y, z = (torch.cat([v[n][k].double().reshape(-1) for n, k in block]) for v in (g, r, left))
        assert (z - project_slowly(x, [y], remove)).norm() <= 1e-6 * x.norm()


@pytest.mark.parametrize("scope", ["global", "module", "row"])
@pytest.mark.parametrize("unless", [None, "both"])
def test_frozen_entries_take_no_part_in_the_sums_nor_in_what_is_removed(scope: Any, unless: str | None) -> None:
    model = build()
    frozen = anatomy().neurons[:, :9] | gs.region(model, "*layers.1.self_attn.q_proj*")
    plain = slots_of(model, [BOTH], batch())
    method = gs.Method([BOTH], gradient=[gs.project(scope=scope)], update=[gs.freeze(frozen, unless=unless)])
    with gs.attach(method, model) as surgery:
        surgery.backward(batch())
        surgery.finish()
        found = grads(model)
        assert gap(surgery.slots["protect"], plain["protect"]) == 0.0
    if unless:  # awake: everything moves, and everything counts
        names, masks = list(plain["protect"]), None
    else:
        names = [n for n in plain["protect"] if n in found]
        masks = {n: ~frozen.of(n).mask() for n in names}
        assert set(plain["main"]) - set(found) == {n for n in frozen.parameters() if frozen.of(n).whole}
        assert all(not found[n][~masks[n]].any() for n in names)
    assert abs(cosine(flat(found, names), flat(plain["protect"], names, masks))) <= 1e-6
    if scope == "global":
        x, y = flat(plain["main"], names, masks), flat(plain["protect"], names, masks)
        wanted = x - (x @ y) / (y @ y) * y
        assert (flat(found, names) - wanted).norm() <= 1e-6 * x.norm()


def test_parameters_that_no_optimizer_holds_take_no_part() -> None:
    model = build()
    held = [n for n, _ in model.named_parameters() if "mlp" in n]
    optimizer = torch.optim.SGD([model.get_parameter(n) for n in held], lr=0.1)
    with gs.attach(gs.Method([BOTH], gradient=[gs.project()]), model, optimizer) as surgery:
        surgery.backward(batch())
        r = {n: surgery.slots["protect"][n].clone() for n in held}
        surgery.finish()
        assert abs(cosine(flat(grads(model), held), flat(r, held))) <= 1e-6


def test_frozen_parameters_and_tied_weights() -> None:
    model = build("gpt_neo")
    model.transformer.h[0].requires_grad_(False)
    with gs.attach(gs.Method([BOTH], gradient=[gs.project()]), model) as surgery:
        surgery.backward(batch())
        r = dict(surgery.slots["protect"])
        surgery.finish()
        found = grads(model)
        assert not any("h.0." in n for n in found)
        assert abs(cosine(flat(found, list(r)), flat(r))) <= 1e-6


def test_a_sign_gate_is_refused_per_micro_batch() -> None:
    said = r"is not linear and cannot run per micro-batch.*; move it from under=\[…\] of pass 'sft' to gradient=\[…\]"
    with pytest.raises(PlanError, match=said):
        gs.Pass("sft", under=[gs.project(remove="conflict")])
    with pytest.raises(PlanError, match="update"):
        gs.Pass("sft", under=[gs.project(at="update")])


def test_slots_that_nothing_fills_are_refused_when_the_plan_is_made() -> None:
    for gradient, update in (
        ([gs.project(away_from="protct")], []),
        ([gs.project(slot="other")], []),
        ([], [gs.project(away_from="protct", at="update")]),
        ([], [gs.leak("protct")]),
        ([gs.ema("protct")], []),
        ([gs.aggregate(slots=["main", "protct"])], []),
        ([gs.project(slot="main", away_from="later"), gs.ema("protect", into="later")], []),
    ):
        with pytest.raises(PlanError, match="which nothing fills; the slots there are: main, protect"):
            gs.Method([BOTH], gradient=gradient, update=update)
    gs.Method([BOTH], gradient=[gs.ema("protect", into="later"), gs.project(away_from="later", park="more")],
              update=[gs.leak("more")])  # fmt: skip
    with pytest.raises(PlanError, match="clip must come last"):
        gs.Method([BOTH], gradient=[gs.clip(1.0), gs.project()])


def test_a_combined_backward_outside_is_an_error_not_a_silent_step() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = weights(model)
    with gs.attach(gs.Method([BOTH], gradient=[gs.project()]), model, optimizer):
        rows = batch()
        model(input_ids=rows["input_ids"], labels=rows["labels"]).loss.backward()
        with pytest.raises(SlotError, match=r"a backward of your own fills .grad alone"):
            optimizer.step()
    assert gap(weights(model), start) == 0.0


def test_a_slot_with_nan_is_an_error_before_anything_moves() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = weights(model)
    with gs.attach(gs.Method([BOTH], gradient=[gs.project()]), model, optimizer) as surgery:
        surgery.backward(batch())
        surgery.slots["protect"]["model.norm.weight"][3] = torch.nan
        with pytest.raises(SlotError, match=r"slot 'protect' holds nan or inf in 'model.norm.weight'"):
            optimizer.step()
    assert gap(weights(model), start) == 0.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gradient", [
    [gs.project(remove="conflict"), gs.clip(0.5)], [gs.ema("protect", 0.5), gs.project()], [gs.aggregate("mgda")],
])  # fmt: skip
def test_a_scaler_changes_nothing_and_a_skipped_step_leaks_nothing(gradient: list[Any], fused: bool) -> None:
    method = gs.Method([BOTH], gradient=gradient)
    models = [build(), build()]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=fused) for m in models]
    surgeries = [gs.attach(method, m, o) for m, o in zip(models, optimizers, strict=True)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    def backward(loss: Tensor, **more: Any) -> None:
        scaler.scale(loss).backward(**more)

    for k in range(6):
        if k == 2:  # this window overflows, and is skipped
            surgeries[1].backward(batch(seed=99), backward=backward)
            next(models[1].parameters()).grad[0, 0] = torch.inf
            surgeries[1].slots["protect"]["model.norm.weight"].fill_(torch.inf)
            before = weights(models[1])
            scaler.step(optimizers[1])
            scaler.update()
            assert gap(weights(models[1]), before) == 0.0
            optimizers[1].zero_grad()
            assert surgeries[1].step == 2 and not surgeries[1].slots
        surgeries[0].backward(batch(seed=k))
        surgeries[1].backward(batch(seed=k), backward=backward)
        optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert gap(weights(models[0]), weights(models[1])) <= 2e-6
    for surgery in surgeries:
        surgery.remove()


def test_a_disabled_step_is_not_projected() -> None:
    model = build()
    plain = slots_of(model, [BOTH], batch())
    with gs.attach(gs.Method([BOTH], gradient=[gs.project()]), model) as surgery:
        with surgery.disabled():
            surgery.backward(batch())
            surgery.finish()
        assert gap(grads(model), plain["main"]) == 0.0


def test_plans_with_projections_are_explained_described_and_dry_run() -> None:
    model = build()
    region = anatomy().neurons[:, :9]
    method = gs.Method(
        [BOTH],
        gradient=[gs.ema("protect"), gs.project(remove="conflict", scope="row", region=region, metrics="global")],
        update=[gs.project(at="update"), gs.leak(), gs.changed_fraction()],
    )
    text = method.explain(model)
    assert "gradient: ema('protect', decay=0.8)" in text
    assert (
        "project('main' away from 'protect', remove='conflict', scope='row', neurons[:, :9], metrics='global'): "
        in text
    )
    assert f"{region.numel():,} entries" in text
    assert "update: project('main' away from 'protect', remove='both', scope='global', at='update')" in text
    assert method.describe()["update"][1:] == ["leak('protect')", "changed_fraction()"]
    found = method.dry_run(model, batch())
    assert sum(found.moved.values()) > 0
    assert all(p.grad is None for p in model.parameters())
    later = gs.Pass("later", size, into="protect", when=gs.on_refresh(), keep=9)
    assert gs.Method([gs.Pass("p"), later], gradient=[gs.project()]).dry_run(model, batch()).moved


def test_the_losses_over_one_forward_cost_one_forward() -> None:
    model = build()
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.attach(gs.Method([BOTH], gradient=[gs.project()]), model, optimizer) as surgery:
        for k in range(3):
            surgery.backward(batch(seed=k))
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    assert len(calls) == 3
