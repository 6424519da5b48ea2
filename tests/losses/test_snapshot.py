"""`gs.losses.snapshot`: the model as it was, restored bit for bit, at the price of the region."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, PlanError, SelectionError
from gradsurgery.losses.references import kept
from tests.engines.test_ranks import launch
from tests.losses.models import bits, build, disturb_, inputs, logits, same

KINDS = ["gpt2", "llama"]


def regions(model: Any) -> dict[str, gs.Region]:
    anatomy = gs.dissect(model)
    scattered = anatomy.neurons[:, [1, 2, 5, 9]] | anatomy.heads[1:, [0, 2]]
    return {
        "units": scattered,
        "their complement": ~scattered,
        "everything": gs.region(model, "*"),
        "tied": gs.region(model, "lm_head.weight"),
        "vectors": gs.region(model, "*norm*" if "Llama" in type(model).__name__ else "*.bias"),
    }


NAMES = ["units", "their complement", "everything", "tied", "vectors"]


def only(region: gs.Region, model: nn.Module, seed: int = 1) -> None:
    """Move the entries of the region alone."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    disturb_(model, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.where(region.of(name).mask(), p, before[name]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [1, 37, 1 << 18])
def test_reference_is_the_model_as_it_was(kind: str, name: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "PART", part)
    model = build(kind)
    region = regions(model)[name]
    reference, before = gs.losses.snapshot(region), logits(model)
    reference.take(model)
    only(region, model)
    now, modes = bits(model), [m.training for m in model.modules()]
    assert not torch.equal(logits(model), before)
    for _ in range(2):
        assert torch.equal(reference(model, inputs()), before)
        assert same(bits(model), now)
        assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    region = regions(model)["units"]
    reference, before = gs.losses.snapshot(region), logits(model)
    reference.take(model)
    only(region, model)
    with torch.no_grad():
        name = next(iter(region.entries))
        model.get_parameter(name).view(-1)[:2] = torch.tensor([torch.nan, -0.0], dtype=dtype)  # bits, not values
    now = {k: v.view(torch.uint8).clone() for k, v in model.state_dict().items()}
    assert torch.equal(reference(model, inputs()), before) or not region.of(name).mask().view(-1)[:2].all()
    assert same({k: v.view(torch.uint8) for k, v in model.state_dict().items()}, now)


def test_first_use_takes_it_otherwise() -> None:
    model = build("gpt2")
    reference = gs.losses.snapshot(regions(model)["units"])
    assert not reference.taken
    before = reference(model, inputs())
    assert reference.taken
    disturb_(model)
    reference.take(model)
    assert not torch.equal(reference(model, inputs()), before)


@pytest.mark.parametrize("where", ["forward", "first part", "later part"])
def test_exceptions_restore_the_model(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "PART", 50)
    model = build("gpt2")
    region = regions(model)["units"]
    reference, before = gs.losses.snapshot(region), logits(model)
    reference.take(model)
    only(region, model)
    now, modes = bits(model), [m.training for m in model.modules()]
    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(model.transformer.h[1], "forward", lambda *a, **k: 1 / 0)
        else:
            whole, calls = kept.gather, iter(range(10_000))
            stop = 0 if where == "first part" else 7
            patch.setattr(kept, "gather", lambda *a: 1 / 0 if next(calls) == stop else whole(*a))
        with pytest.raises(ZeroDivisionError):
            reference(model, inputs())
    assert same(bits(model), now)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(reference(model, inputs()), before)


def test_pending_graphs_are_not_disturbed() -> None:
    model = build("llama").eval()
    region = regions(model)["everything"]
    reference = gs.losses.snapshot(region)
    reference.take(model)
    only(region, model)
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(**batch).loss
    reference(model, inputs())
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_inside_somebodys_autocast() -> None:
    """Autocast keeps low-precision weights: the reference must not see the live ones, nor leave its own behind."""
    model = build("llama").eval()
    region = regions(model)["everything"]
    reference = gs.losses.snapshot(region)
    reference.take(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
    only(region, model)
    with torch.autocast("cpu", torch.bfloat16):
        alone = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        live = model(**inputs()).logits
        assert torch.equal(reference(model, inputs()), before)
        after = model(**inputs()).logits
        assert torch.equal(after, live)
        assert torch.equal(after, alone)
    after.float().sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_memory_is_the_regions() -> None:
    model = build("gpt2")
    region = regions(model)["units"]
    reference = gs.losses.snapshot(region)
    reference.take(model)
    assert sum(value.numel() for value in reference.state_dict().values()) == region.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_first_ones_reference(kind: str, tmp_path: Any) -> None:
    model = build(kind)
    region = regions(model)["units"]
    first = gs.losses.snapshot(region)
    assert first.state_dict() == {}
    first.take(model)
    before = logits(model)
    only(region, model)
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    resumed = copy.deepcopy(model)
    second = gs.losses.snapshot(gs.region(resumed, "*") & region)
    second.take(resumed)  # as an attached surgery does, before it loads its state
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert second.state_dict().keys() == first.state_dict().keys()
    assert torch.equal(second(resumed, inputs()), before)
    assert all(torch.equal(second.state_dict()[name], value) for name, value in first.state_dict().items())


def test_states_of_another_region_or_dtype() -> None:
    model = build("llama")
    some = regions(model)
    state = gs.losses.snapshot(some["units"])
    state.take(model)
    with pytest.raises(ArtefactError, match="the region of the first run"):
        gs.losses.snapshot(some["vectors"]).load_state_dict(state.state_dict())
    later = gs.losses.snapshot(some["units"])
    later.load_state_dict({name: value.bfloat16() for name, value in state.state_dict().items()})
    with pytest.raises(PlanError, match="dtype of the first run"):
        later(model, inputs())


def test_refusals() -> None:
    model = build("llama")
    region = regions(model)["units"]
    with pytest.raises(SelectionError, match="empty"):
        gs.losses.snapshot(region - region)
    with pytest.raises(SelectionError, match="another model"):
        gs.losses.snapshot(region).take(build("gpt2"))
    reference = gs.losses.snapshot(region)
    reference.take(model)
    with pytest.raises(PlanError, match="take\\(model\\)"):
        reference(build("llama"), inputs())
    with pytest.raises(PlanError, match="cast and shard"):
        reference(model.bfloat16(), inputs())


def test_wrapped_models() -> None:
    model = build("llama")
    region = regions(model)["units"]
    reference = gs.losses.snapshot(region)
    reference.take(model)
    before = logits(model)
    only(region, model)
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(reference(compiled, inputs()), before)


def test_as_a_reference_of_a_pass() -> None:
    model = build("llama")
    region = regions(model)["units"]
    reference = gs.losses.snapshot(region)
    method = gs.Method(passes=[gs.Pass("public", gs.losses.kl_divergence, refs={"reference": reference})])
    reference.take(model)
    batch = {"input_ids": inputs()["input_ids"], "attention_mask": inputs()["attention_mask"]}
    with gs.attach(method, model.eval()) as surgery:
        assert surgery.backward(batch)["public"] == 0
        model.zero_grad()
        only(region, model)
        assert surgery.backward(batch)["public"] > 0.01
        assert surgery.count_items([batch])["public"] == 12


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks_see_what_one_sees(tmp_path: Any) -> None:
    found = launch("tests.losses.ranks", directory=tmp_path)
    assert all(found.values()), found
    assert len(found) == 12
