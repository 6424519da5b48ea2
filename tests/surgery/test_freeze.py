"""Frozen entries are bit for bit the same after steps of any optimizer, whatever its moments and decay say."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

import gradsurgery as gs
from gradsurgery.surgery.method import Method
from tests.surgery.tiny import anatomy, batch, build, forget_of, grads, weights

OPTIMIZERS: dict[str, Any] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw foreach": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw amsgrad": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "adam coupled decay": functools.partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1),
    "sgd momentum": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd fused": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-2, momentum=0.5, weight_decay=0.1),
    "adafactor torch": functools.partial(torch.optim.Adafactor, lr=1e-2, weight_decay=0.1),
    "adafactor transformers": functools.partial(
        Adafactor, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False, beta1=0.9
    ),
}


def regions(model: nn.Module) -> gs.Region:
    """Partly and wholly frozen tensors."""
    return (
        forget_of()
        | anatomy().neurons[0, :3]
        | gs.region(model, ["model.norm.weight", "model.layers.1.mlp.gate_proj.weight"])
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, nan included: some kernels of torch start momenta from memory that they never wrote."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def run(surgery: gs.Surgery, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for k in range(steps):
        surgery.backward(batch(seed=first + k))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_entries_do_not_move_with_moments_from_before(name: str, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    with gs.attach(gs.methods.plain(), model, optimizer) as surgery:
        run(surgery, optimizer, 2)  # moments are not zero
    frozen, before = regions(model), weights(model)
    moments = {
        (n, key): value.clone()
        for n, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
        if isinstance(value, torch.Tensor) and value.shape == p.shape
    }
    with gs.attach(
        Method([gs.Pass("p")], gradient=[gs.clip(1.0)], update=[gs.freeze(frozen)]), model, optimizer
    ) as surgery:
        run(surgery, optimizer, 3, first=2)
    for n, p in model.named_parameters():
        held = frozen.of(n).mask()
        assert torch.equal(p[held], before[n][held]), n
        for key, value in optimizer.state[p].items():
            if (n, key) in moments:
                assert same_bits(value[held], moments[n, key][held]), (n, key)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "sgd momentum", "adam coupled decay"])
def test_frozen_from_the_first_step(name: str) -> None:
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    frozen, before = regions(model), weights(model)
    with gs.attach(Method([gs.Pass("p")], update=[gs.freeze(frozen)]), model, optimizer) as surgery:
        run(surgery, optimizer, 3)
    for n, p in model.named_parameters():
        held = frozen.of(n).mask()
        assert torch.equal(p[held], before[n][held]), n
    wholly = dict(model.named_parameters())["model.norm.weight"]
    assert not optimizer.state.get(wholly)  # its gradient was None


def test_unless_wakes_the_region_in_steps_of_a_pass() -> None:
    model = build()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    region = forget_of()
    method = Method([gs.Pass("a"), gs.Pass("b", when=gs.every(2))], update=[gs.freeze(region, unless="b")])
    moved = []
    with gs.attach(method, model, optimizer) as surgery:
        for k in range(4):
            before = weights(model)
            run(surgery, optimizer, 1, first=k)
            moved.append(
                any(
                    not torch.equal(before[n][region.of(n).mask()], p[region.of(n).mask()])
                    for n, p in model.named_parameters()
                )
            )
    assert moved == [True, False, True, False]


def test_frozen_parameters_may_carry_no_gradient() -> None:
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    forget = forget_of()
    under = [gs.mask(anatomy().rest(forget), where="forget"), gs.zero(forget, where="retain")]
    before = weights(model)
    with gs.attach(
        Method([gs.Pass("p", under=under)], [gs.clip(1.0)], [gs.freeze(forget)]), model, optimizer
    ) as surgery:
        surgery.backward(batch())
        assert all("layers.1" in n for n in grads(model))
        optimizer.step()
    for n, p in model.named_parameters():
        held = forget.of(n).mask() if p.requires_grad else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p[held], before[n][held])
        assert held.all() or not torch.equal(p, before[n])


@pytest.mark.parametrize("name", ["adam coupled decay", "sgd momentum"])
def test_moments_that_were_zero_stay_zero_where_decay_enters_them(name: str) -> None:
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()  # moments exist and are zero
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    frozen = anatomy().neurons[:, :4]
    with gs.attach(Method([gs.Pass("p")], update=[gs.freeze(frozen)]), model, optimizer) as surgery:
        run(surgery, optimizer, 2)
    for n, p in model.named_parameters():
        for value in optimizer.state[p].values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                assert not value[frozen.of(n).mask()].any(), n


def test_moments_that_a_disabled_step_filled_are_seen() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    frozen = anatomy().neurons[:, :4]
    with gs.attach(Method([gs.Pass("p")], update=[gs.freeze(frozen)]), model, optimizer) as surgery:
        run(surgery, optimizer, 2)  # moments are zero on frozen entries, which is remembered
        with surgery.disabled():
            run(surgery, optimizer, 1)
        before = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
        run(surgery, optimizer, 2)
    for n, p in model.named_parameters():
        held = frozen.of(n).mask()
        assert torch.equal(optimizer.state[p]["exp_avg"][held], before[n][held]), n
    assert any(bool(before[n][frozen.of(n).mask()].any()) for n in before)
