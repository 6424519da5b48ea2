"""Gradient checkpointing changes nothing, autocast keeps masks exact, wrappers are seen through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.surgery.tiny import anatomy, batch, build, forget_of, gap, grads, sgtm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize(
    ("kind", "strategy"), [("llama", "mask"), ("llama", "detach"), ("gpt_neo", "mask"), ("gpt_neo", "zero")]
)
def test_gradient_checkpointing_changes_nothing(kind: str, strategy: str, reentrant: bool) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        model = build(kind)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        block = (model.model.layers if kind == "llama" else model.transformer.h)[0]
        count: list[int] = []
        block.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        with gs.attach(sgtm(kind, strategy, stages=False), model) as surgery:
            for seed in range(2):
                surgery.backward(batch(seed=seed))
        found.append(grads(model))
        calls.append(len(count))
    assert calls == [2, 4]  # it was recomputed, under the same transforms
    assert gap(*found) == 0.0


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_a_recomputation_that_stops_early_restores_swapped_parameters(reentrant: bool) -> None:
    """Checkpointing leaves a block's forward by an exception once it has what it needs: here inside a masked norm."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(torch.tanh(self.up(x)))

    def loss(model: Block) -> torch.Tensor:
        x = torch.arange(8.0).reshape(2, 4).requires_grad_()
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum()

    model = Block()
    scale = gs.scale(gs.region(model, "norm.weight"), 0.5)
    names = {n: id(p) for n, p in model.named_parameters()}
    with gs.applied(model, scale):
        loss(model).backward()
        assert {n: id(p) for n, p in model.named_parameters()} == names
    scaled = grads(model)
    model.zero_grad()
    loss(model).backward()
    assert torch.allclose(scaled["norm.weight"], grads(model)["norm.weight"] / 2)
    assert torch.allclose(scaled["up.weight"], grads(model)["up.weight"])


def masked_part(kind: str) -> gs.Region:
    """What forget rows must not train."""
    found, forget = anatomy(kind), forget_of(kind)
    return found.rest(forget) | found.structure("embedding")


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
@pytest.mark.parametrize("loss_scale", [1.0, float("inf")], ids=["finite", "inf"])
def test_bf16_autocast_keeps_masks_exactly_zero(kind: str, loss_scale: float) -> None:
    data = batch()
    data["forget"][:], data["retain"][:] = True, False
    model = build(kind)
    with gs.attach(sgtm(kind, stages=False), model) as surgery, torch.autocast("cpu", torch.bfloat16):
        surgery.backward(data, backward=lambda loss: (loss * loss_scale).backward())
    region = masked_part(kind)
    for name, gradient in grads(model).items():
        part = region.of(name).mask()
        assert not gradient[part].any(), name  # also where the incoming gradient is inf or nan
        assert gradient.dtype == torch.float32
    if loss_scale == 1.0:
        assert any(gradient.any() for gradient in grads(model).values())


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_bf16_autocast_and_bf16_weights_are_near_fp32(kind: str) -> None:
    exact, autocast, low = build(kind), build(kind), build(kind).to(torch.bfloat16)
    with gs.attach(sgtm(kind, stages=False), exact) as surgery:
        surgery.backward(batch())
    with gs.attach(sgtm(kind, stages=False), autocast) as surgery, torch.autocast("cpu", torch.bfloat16):
        surgery.backward(batch())
    with gs.attach(sgtm(kind, stages=False), low) as surgery:
        surgery.backward(batch())
    for other in (autocast, low):
        for name, gradient in grads(exact).items():
            near = other.get_parameter(name).grad
            assert near is not None
            assert nn.functional.cosine_similarity(gradient.flatten(), near.float().flatten(), dim=0) > 0.98, name


def test_autocast_around_the_forward_alone_as_accelerate_does_it() -> None:
    model, plain = build(), build()
    forward = model.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    wrapped.__wrapped__ = forward  # type: ignore[attr-defined]
    model.forward = wrapped
    for candidate in (model, plain):
        with gs.attach(sgtm(stages=False), candidate) as surgery:
            candidate.zero_grad()
            if candidate is plain:
                with torch.autocast("cpu", torch.bfloat16):
                    surgery.backward(batch())
            else:
                surgery.backward(batch())
    for name, gradient in grads(plain).items():
        mine = model.get_parameter(name).grad
        assert mine is not None
        assert torch.allclose(gradient, mine, atol=5e-3)


def test_cpu_scaler_unscales_before_the_stages_and_skips_whole_steps() -> None:
    model, plain = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    with gs.attach(sgtm(), model, optimizer) as surgery, gs.attach(sgtm(), plain, other) as stock:
        for k in range(3):
            surgery.backward(batch(seed=k), backward=lambda loss: scaler.scale(loss).backward())
            if k == 1:  # an overflow: the step is skipped
                model.model.norm.weight.grad.fill_(float("inf"))
                model.lm_head.weight.grad.fill_(float("inf"))
            else:
                stock.backward(batch(seed=k))
                other.step()
                other.zero_grad()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert surgery.step == stock.step == 2
    assert (
        gap({n: p.detach() for n, p in model.named_parameters()}, {n: p.detach() for n, p in plain.named_parameters()})
        < 1e-6
    )
