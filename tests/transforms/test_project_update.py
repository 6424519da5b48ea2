"""Projection of the update: the parameters' delta over a real optimizer's step, with its momentum and decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from tests.surgery.tiny import anatomy, batch, build, weights
from tests.transforms.vectors import project_slowly

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
    "adamw, large": lambda p: torch.optim.AdamW(p, lr=3e-2, weight_decay=0.1),
    "adamw, small": lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def size(outputs: Any, rows: Any, refs: Any) -> Tensor:
    """A second loss over the same forward: how large the logits are."""
    return outputs.logits.float().square().mean()


def method(update: list[Any], gradient: list[Any] | None = None, **options: Any) -> gs.Method:
    losses = {"ce": gs.losses.causal_lm, "size": size}
    both = gs.Pass("both", losses, into={"ce": "main", "size": "protect"}, **options)
    return gs.Method([both], gradient=gradient or [], update=update)


def vector(named: dict[str, Tensor], names: list[str], masks: dict[str, Tensor] | None = None) -> Tensor:
    parts = [named[n].double() * (masks[n] if masks and n in masks else 1.0) for n in names]
    return torch.cat([p.reshape(-1) for p in parts])


def cosines(
    model: nn.Module, plan: gs.Method, optimizer: torch.optim.Optimizer, steps: int = 20, masks: Any = None
) -> list[float]:
    """Of the delta with the protected gradient, over the entries that ``masks`` keep, after every step."""
    out = []
    with gs.attach(plan, model, optimizer) as surgery:
        for k in range(steps):
            before = weights(model)
            surgery.backward(batch(seed=k))
            r = {n: g.clone() for n, g in surgery.slots["protect"].items()}
            optimizer.step()
            delta = {n: p.detach().double() - before[n].double() for n, p in model.named_parameters()}
            x, y = vector(delta, list(r), masks), vector(r, list(r), masks)
            out.append(float(x @ y / x.norm() / y.norm()))
            optimizer.zero_grad()
    return out


SCOPES = [("global", name) for name in OPTIMIZERS] + [
    # not the small steps: the gaps between 24 norm weights near one are a hundredth of those, so that no delta on the
    # grid of such a small block need be orthogonal to 1e-6
    (scope, name)
    for scope in ("module", "tensor", "row")
    for name in OPTIMIZERS
    if name != "adamw, small"
]


@pytest.mark.parametrize(("scope", "name"), SCOPES)
def test_the_delta_of_every_step_is_orthogonal(name: str, scope: Any) -> None:
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    found = cosines(model, method([gs.project(at="update", scope=scope)]), optimizer)
    assert max(map(abs, found)) <= 1e-6, found


def test_without_it_the_optimizer_turns_an_orthogonal_gradient() -> None:
    model = build()
    found = cosines(model, method([], [gs.project()]), OPTIMIZERS["adamw"](model.parameters()))
    assert max(map(abs, found)) > 1e-2


@pytest.mark.parametrize("remove", ["conflict", "agreement"])
def test_one_side_alone_is_removed(remove: Any) -> None:
    plain, model = build(), build()
    before = cosines(plain, method([]), OPTIMIZERS["adamw"](plain.parameters()), steps=1)[0]
    found = cosines(
        model, method([gs.project(at="update", remove=remove)]), OPTIMIZERS["adamw"](model.parameters()), steps=8
    )
    uphill = remove == "conflict"
    assert all(c <= 1e-6 if uphill else c >= -1e-6 for c in found)
    touched = (before > 0) == uphill
    assert (abs(found[0]) <= 1e-6) == touched
    assert any(abs(c) > 1e-3 for c in found) or touched


@pytest.mark.parametrize("order", ["freeze first", "project first"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_entries_that_are_frozen_take_no_part(order: str, name: str) -> None:
    model = build()
    frozen = anatomy().neurons[0, :9] | gs.region(model, "model.embed_tokens.weight")
    updates = [gs.freeze(frozen), gs.project(at="update")]
    start = weights(model)
    masks = {n: ~frozen.of(n).mask() for n in start}
    plan = method(updates if order == "freeze first" else updates[::-1])
    found = cosines(model, plan, OPTIMIZERS[name](model.parameters()), masks=masks)
    assert max(map(abs, found)) <= 1e-6
    for n, p in model.named_parameters():
        held = frozen.of(n).mask()
        assert torch.equal(p.detach()[held], start[n][held])


@pytest.mark.parametrize("first", [True, False])
def test_decay_towards_values_is_part_of_the_delta_wherever_it_stands(first: bool) -> None:
    model = build()
    decay = gs.decay_to(gs.region(model, "*mlp*"), rate=10.0)
    updates = [decay, gs.project(at="update")]
    plan = method(updates if first else updates[::-1])
    assert max(map(abs, cosines(model, plan, OPTIMIZERS["adamw"](model.parameters())))) <= 1e-6


def test_a_step_in_another_configuration_is_projected_where_the_gradient_lies() -> None:
    model = build("llama")
    key = gs.PermutationKey.generate(anatomy(), 0.3, seed=0)
    update = [gs.keys.StepUnder(key), gs.project(at="update")]
    found = cosines(model, method(update), OPTIMIZERS["adamw"](model.parameters()), steps=8)
    assert max(map(abs, found)) <= 1e-6


@given(st.integers(0, 10**6), st.sampled_from(["adamw", "sgd"]), st.floats(-1, 2), st.floats(-1, 2))
@settings(max_examples=10, deadline=None)
def test_weights_of_what_is_kept_and_removed(seed: int, name: str, keep: float, removed: float) -> None:
    """Two copies, one step: with and without the projection."""
    stock, model = build(seed=seed).double(), build(seed=seed).double()
    start = weights(stock)
    transform = gs.project(at="update", keep_weight=keep, removed_weight=removed)
    for one, update in ((stock, []), (model, [transform])):
        optimizer = OPTIMIZERS[name](one.parameters())
        with gs.attach(method(update), one, optimizer) as surgery:
            surgery.backward(batch(seed=seed))
            r = {n: g.clone() for n, g in surgery.slots["protect"].items()}
            optimizer.step()
    x = vector({n: p.detach() - start[n] for n, p in stock.named_parameters()}, list(r))
    found = vector({n: p.detach() - start[n] for n, p in model.named_parameters()}, list(r))
    y = vector(r, list(r))
    wanted = keep * x - removed * (x @ y) / (y @ y) * y
    assert (found - wanted).norm() <= 1e-9 * x.norm()


def test_only_the_region_is_copied_and_changed() -> None:
    stock, model = build(), build()
    region = gs.region(model, "*layers.1.*")
    start = weights(stock)
    for one, update in ((stock, []), (model, [gs.project(at="update", region=region)])):
        optimizer = OPTIMIZERS["adamw"](one.parameters())
        with gs.attach(method(update), one, optimizer) as surgery:
            surgery.backward(batch())
            r = {n: g.clone() for n, g in surgery.slots["protect"].items() if n in region}
            optimizer.step()
    for n, p in model.named_parameters():
        assert n in region or torch.equal(p, stock.get_parameter(n))
    x = vector({n: p.detach().double() - start[n].double() for n, p in model.named_parameters()}, list(r))
    y = vector(r, list(r))
    assert abs(float(x @ y / x.norm() / y.norm())) <= 1e-6


def test_several_vectors_at_once() -> None:
    model = build()
    passes = [*method([]).passes, gs.Pass("other", size, rows="forget", into="other")]
    plan = gs.Method(passes, update=[gs.project(at="update", away_from=["protect", "other"])])
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with gs.attach(plan, model, optimizer) as surgery:
        for k in range(6):
            before = weights(model)
            surgery.backward(batch(seed=k))
            slots = {name: {n: g.clone() for n, g in grads.items()} for name, grads in surgery.slots.items()}
            optimizer.step()
            delta = {n: p.detach().double() - before[n].double() for n, p in model.named_parameters()}
            for r in slots.values():
                x, y = vector(delta, list(r)), vector(r, list(r))
                assert abs(float(x @ y / x.norm() / y.norm())) <= 1e-6
            optimizer.zero_grad()


@pytest.mark.parametrize("remove", ["conflict", "agreement"])
@pytest.mark.parametrize("seed", range(4))
def test_one_side_of_several_vectors_is_the_nearest_allowed_delta(remove: Any, seed: int) -> None:
    passes = [*method([]).passes, gs.Pass("other", size, rows="forget", into="other")]
    passes.append(gs.Pass("third", size, rows="retain", weight=-1.0, into="third"))
    names = ["protect", "other", "third"]
    deltas, vectors = [], []
    for update in ([], [gs.project(at="update", away_from=names, remove=remove)]):
        model = build(seed=seed).double()
        before, optimizer = weights(model), OPTIMIZERS["adamw"](model.parameters())
        with gs.attach(gs.Method(passes, update=update), model, optimizer) as surgery:
            surgery.backward(batch(seed=seed))
            known = list(surgery.slots["protect"])
            vectors = [vector(surgery.slots[name], known) for name in names]
            optimizer.step()
        deltas.append(vector({n: p.detach() - before[n] for n, p in model.named_parameters()}, known))
    wanted = project_slowly(deltas[0], vectors, remove, upwards=True)
    assert (deltas[1] - wanted).norm() <= 1e-6 * deltas[0].norm()


def test_bf16_comes_as_near_as_its_weights_allow() -> None:
    model = build().bfloat16()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    found = cosines(model, method([gs.project(at="update", metrics="global")]), optimizer)
    plain = build().bfloat16()
    stock = cosines(plain, method([]), OPTIMIZERS["adamw"](plain.parameters()))
    assert max(map(abs, found)) < 0.1 * max(map(abs, stock))


def test_a_disabled_step_is_the_stock_step_and_the_next_is_projected_again() -> None:
    stock, model = build(), build()
    one, two = (OPTIMIZERS["adamw"](m.parameters()) for m in (stock, model))
    with (
        gs.attach(method([]), stock, one) as plain,
        gs.attach(method([gs.project(at="update")]), model, two) as surgery,
    ):
        plain.backward(batch())
        one.step()
        with surgery.disabled():
            surgery.backward(batch())
            two.step()
        assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), model.parameters(), strict=True))
        two.zero_grad()
        before = weights(model)
        surgery.backward(batch(seed=1))
        r = {n: g.clone() for n, g in surgery.slots["protect"].items()}
        two.step()
        x = vector({n: p.detach().double() - before[n].double() for n, p in model.named_parameters()}, list(r))
        y = vector(r, list(r))
        assert abs(float(x @ y / x.norm() / y.norm())) <= 1e-6
