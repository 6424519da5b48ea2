"""RMU is the paper's loss, written out with plain hooks in fp64, and moves nothing but what it is told to."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError, SelectionError
from tests.engines.test_ranks import launch
from tests.surgery.tiny import batch, build, grads, weights

STACK = {"llama": "model.layers", "gpt_neo": "transformer.h"}
MLP = {"llama": "mlp.down_proj.weight", "gpt_neo": "mlp.c_proj"}
ATOL = 1e-6  # norms, rotary tables and GPT-Neo's attention scores are fp32 also in a float64 model


def hidden(model: nn.Module, layer: str, inputs: dict[str, Tensor]) -> Tensor:
    """What the module returns, by a plain hook."""
    kept: list[Any] = []
    handle = dict(model.named_modules())[layer].register_forward_hook(lambda m, a, out: kept.append(out))
    model(**inputs)
    handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def direction(width: int, seed: int) -> Tensor:
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm()


def oracle(
    model: nn.Module, before: nn.Module, layer: str, data: dict[str, Tensor], c: float, f: float, r: float, seed: int
) -> dict[str, Tensor]:
    """Gradients of ``f |h - c u|^2 + r |h - h_before|^2``, position by position."""
    model.zero_grad()
    total: Any = 0.0
    for column, weight in (("forget", f), ("retain", r)):
        rows = data[column]
        inputs = {name: data[name][rows] for name in ("input_ids", "attention_mask")}
        found = hidden(model, layer, inputs)
        with torch.no_grad():
            held = hidden(before, layer, inputs)
        target = c * direction(found.shape[-1], seed).expand_as(found) if column == "forget" else held
        errors = [
            (found[i, t] - target[i, t]).square().mean()
            for i in range(len(found))
            for t in range(found.shape[1])
            if inputs["attention_mask"][i, t]
        ]
        total = total + weight * torch.stack(errors).mean()
    total.backward()
    return grads(model)


@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(["llama", "gpt_neo"]),
    number=st.integers(0, 1),
    c=st.floats(0.1, 30),
    f=st.floats(0.1, 3),
    r=st.floats(0.1, 100),
    seed=st.integers(0, 10**6),
)
def test_gradients_are_the_papers(kind: str, number: int, c: float, f: float, r: float, seed: int) -> None:
    model, data = build(kind).double(), batch(seed=seed)
    before = copy.deepcopy(model)
    layer, trained = f"{STACK[kind]}.{number}", gs.region(model, f"{STACK[kind]}.0.{MLP[kind]}")
    method = gs.methods.rmu(layer, trained, f, r, steering=c, seed=seed)
    with gs.attach(method, model) as surgery:
        with torch.no_grad():  # away from the reference, inside of what trains
            for name in trained.parameters():
                model.get_parameter(name).add_(0.3)
        surgery.backward(data)
    mine = grads(model)
    theirs = oracle(model, before, layer, data, c, f, r, seed)
    for name in trained.parameters():
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=ATOL * max(c, r))


@pytest.mark.parametrize("reference", ["snapshot", "frozen"])
def test_nothing_else_moves_and_forget_activations_turn(reference: str) -> None:
    model, data = build("llama"), batch()
    before, held = weights(model), copy.deepcopy(model)
    trained = gs.region(model, "model.layers.*.mlp.down_proj.weight")
    given = None if reference == "snapshot" else gs.losses.frozen(held)
    method = gs.methods.rmu("model.layers.1", trained, retain_weight=5.0, steering=4.0, reference=given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}

    def cosine(rows: Tensor) -> float:
        found = hidden(model, "model.layers.1", inputs)[rows].double()[data["attention_mask"][rows] > 0]
        return torch.cosine_similarity(found, direction(found.shape[-1], 0), dim=-1).mean().item()

    start = cosine(data["forget"])
    with gs.attach(method, model, optimizer) as surgery:
        losses = []
        for _ in range(30):
            losses.append(surgery.backward(data))
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0]["retain"] == 0 and losses[-1]["forget"] < losses[0]["forget"]
    assert cosine(data["forget"]) > start + 0.2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained.entries), name
    assert not hooks(model)


def test_micro_batches_and_streams_add_up() -> None:
    model, data = build("llama").double(), batch(rows=6)
    trained = gs.region(model, "model.layers.0.mlp.down_proj.weight")
    with gs.attach(gs.methods.rmu("model.layers.0", trained), model) as surgery:
        with torch.no_grad():
            model.get_parameter(*trained.parameters()).add_(0.3)
        surgery.backward(data)
        whole = grads(model)
        model.zero_grad()
        parts = [{k: v[rows] for k, v in data.items()} for rows in (slice(0, 2), slice(2, 6))]
        items = surgery.count_items(parts)
        for part in parts:
            surgery.backward(part, num_items=items)
    torch.testing.assert_close(grads(model), whole, rtol=1e-5, atol=ATOL)


def test_checkpointing_records_the_same_and_keeps_no_hooks() -> None:
    found = []
    for checkpointed in (False, True):
        model = build("llama")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        before = hooks(model)  # checkpointing has one of its own
        trained = gs.region(model, "model.layers.0.mlp.down_proj.weight")
        with gs.attach(gs.methods.rmu("model.layers.0", trained), model) as surgery:
            surgery.backward(batch())
        gc.collect()
        assert hooks(model) == before
        found.append(grads(model)[trained.parameters()[0]])
    torch.testing.assert_close(found[0], found[1])


def test_bf16_is_finite_and_a_failed_pass_leaves_no_hook() -> None:
    model = build("llama").bfloat16()
    trained = gs.region(model, "model.layers.0.mlp.down_proj.weight")
    with gs.attach(gs.methods.rmu("model.layers.0", trained), model) as surgery:
        assert all(loss.isfinite() for loss in surgery.backward(batch()).values())
        with pytest.raises(IndexError):
            surgery.backward({**batch(), "input_ids": torch.full((6, 7), 10**6)})
    gc.collect()
    assert not hooks(model)


def test_refusals() -> None:
    model = build("llama")
    first = gs.region(model, "model.layers.0.mlp.down_proj.weight")
    last = gs.region(model, "model.layers.*.mlp.down_proj.weight")
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: gs.methods.rmu("model.layers.7", first), SelectionError, "no parameter of LlamaForCausalLM"),
        (lambda: gs.methods.rmu("model.layers.0", last), PlanError, "layers.1.mlp.down_proj.weight lies behind"),
        (lambda: gs.methods.rmu("model.layers.0", "mlp"), PlanError, "modules is a region"),  # type: ignore[arg-type]
        (lambda: gs.methods.rmu("model.layers.0", first, steering=0.0), PlanError, "steering"),
        (lambda: gs.methods.rmu("model.layers.0", first, retain_weight=-1), PlanError, "retain_weight"),
        (lambda: gs.methods.rmu("model.layers.0", first, by="columns"), PlanError, "by is"),  # type: ignore[arg-type]
    ]
    for call, kind, said in cases:
        with pytest.raises(kind, match=said):
            call()
    wrong = gs.Pass("a", gs.losses.activation_mse, refs={"activations": gs.losses.activations("model.layer.0")})
    with pytest.raises(SelectionError, match=r"no module 'model.layer.0'; near names: model.layers.0"):
        gs.attach(gs.Method([wrong]), model)
    never = gs.Pass("a", gs.losses.activation_mse, refs={"activations": gs.losses.activations("model.layers")})
    with gs.attach(gs.Method([never]), model) as surgery, pytest.raises(BatchError, match="was not called"):
        surgery.backward(batch())
    with pytest.raises(BatchError, match="needs refs"):
        gs.losses.activation_mse(None, batch(), {})


def test_without_a_retain_pass_only_forget_rows_are_needed() -> None:
    model = build("llama")
    trained = gs.region(model, "model.layers.0.mlp.down_proj.weight")
    method = gs.methods.rmu("model.layers.0", trained, retain_weight=0.0)
    assert [p.name for p in method.passes] == ["forget"]
    assert "steer(20, seed 0)" in method.explain(model)


@pytest.mark.parametrize("how", ["wrapped", "in place", "the block"])
def test_compiled_calls_are_refused(how: str) -> None:
    model = build("llama")
    host: Any = model
    if how == "wrapped":
        host = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model.model.layers[0]).compile(backend="eager")
    method = gs.methods.rmu("model.layers.0", gs.region(model, "model.layers.0.mlp.down_proj.weight"))
    with gs.attach(method, host) as surgery, pytest.raises(PlanError, match="inside of compiled code"):
        surgery.backward(batch())


@pytest.mark.slow
@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(host: str, tmp_path: Path) -> None:
    found = launch("tests.methods.rmu_ranks", host, directory=tmp_path)
    assert max(found["gaps"]) < 1e-6 * max(1.0, found["size"])  # llama's norms are fp32, and AdamW divides by gradients
