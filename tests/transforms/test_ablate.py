"""Ablated units: the forward of ``zero``, exact in every dtype, and a model that saves and loads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError
from tests.engines.test_ranks import launch
from tests.transforms.cases import case, units
from tests.transforms.test_properties import ARCHITECTURES, few
from tests.zoo.builder import ZOO

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@each_architecture
def test_ablated_is_zeroed(name: str) -> None:
    c = case(name)

    @few
    @given(units(c))
    @torch.no_grad()
    def check(chosen: gs.Units) -> None:
        ablated = c.copy()
        gs.ablate_(ablated, chosen)
        found = c.outputs(ablated)
        assert (found != c.outputs()).any()
        with gs.applied(c.model, gs.zero(chosen)):
            torch.testing.assert_close(found, c.outputs(), rtol=1e-6, atol=1e-6)

    check()


@each_architecture
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_only_the_units_change(name: str, dtype: torch.dtype) -> None:
    c = case(name, dtype)

    @settings(few, max_examples=1)
    @given(units(c), st.sampled_from(["zero", "normal"]))
    def check(chosen: gs.Units, reinit: str) -> None:
        ablated = c.copy()
        gs.ablate_(ablated, chosen, reinit)  # type: ignore[arg-type]
        closed = all(g.closed for g, _ in chosen.groups)
        before = dict(c.model.named_parameters())
        for parameter, after in ablated.named_parameters():
            inside = (chosen if closed else chosen.consumers).of(parameter).mask()
            outside = torch.ones_like(inside) if parameter not in chosen.entries else ~chosen.of(parameter).mask()
            assert torch.equal(after[outside], before[parameter][outside])
            if reinit == "zero":
                assert not after[inside].count_nonzero()
            elif inside.any():
                assert (after[inside] != before[parameter][inside]).float().mean() > 0.9
        assert all(p.grad is None for p in ablated.parameters())

    check()


def test_normal_has_the_spread_of_what_remains() -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31, hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
        )
    )
    anatomy = gs.dissect(model)
    chosen = anatomy.neurons[:, ::2]
    with torch.no_grad():
        for name, part in chosen.entries.items():
            parameter = model.get_parameter(name)
            parameter.normal_(0, 3.0)
            parameter[part.mask()] = 100.0
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    gs.ablate_(one, chosen, "normal", torch.Generator().manual_seed(5))
    gs.ablate_(other, chosen, "normal", torch.Generator().manual_seed(5))
    model, one, other = (m.requires_grad_(False) for m in (model, one, other))
    for name, part in chosen.entries.items():
        drawn = one.get_parameter(name)[part.mask()]
        assert torch.equal(drawn, other.get_parameter(name)[part.mask()])
        rest = model.get_parameter(name)[~part.mask()]
        assert abs(float(drawn.std()) / float(rest.std()) - 1) < 0.05
        assert abs(float(drawn.mean())) < 0.2


def test_a_whole_tensor_gets_its_own_spread() -> None:
    c = case("llama")
    ablated = c.copy()
    name = c.anatomy.groups[0].footprints[0].name_of(0)
    gs.ablate_(ablated, c.anatomy.kv_groups, "normal")
    before, after = (m.get_parameter(name).detach() for m in (c.model, ablated))
    assert abs(float(after.std() / before.std()) - 1) < 0.1


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("qwen3")
    whole, chunked = c.copy(), c.copy()
    chosen = c.anatomy.neurons[:, [3, 7, 8]] | c.anatomy.kv_groups[:, :1]
    gs.ablate_(whole, chosen, "normal", torch.Generator().manual_seed(1))
    monkeypatch.setattr("gradsurgery.transforms.ablate.CHUNK", 64)
    gs.ablate_(chunked, chosen, "normal", torch.Generator().manual_seed(1))
    for a, b in zip(whole.parameters(), chunked.parameters(), strict=True):
        assert (a != b).float().mean() < 0.5  # other draws where chunks cut them, the same entries
    for (name, a), b in zip(c.model.named_parameters(), chunked.parameters(), strict=True):
        outside = ~chosen.of(name).mask()
        assert torch.equal(a[outside], b[outside])


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "vit"])
def test_saves_and_loads(name: str, tmp_path: Path) -> None:
    c = case(name)
    ablated = c.copy()
    gs.ablate_(ablated, c.anatomy.heads[:, :1] | c.anatomy.neurons[:, -2:])
    ablated.save_pretrained(tmp_path)
    loaded = getattr(transformers, ZOO[name][0]).from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float64
    )
    loaded.config._experts_implementation = "eager"
    assert type(loaded) is type(c.model)
    with torch.no_grad():
        torch.testing.assert_close(c.outputs(loaded), c.outputs(ablated), rtol=1e-6, atol=1e-6)


def test_refusals() -> None:
    c, other = case("llama"), case("gpt2")
    before = {n: p.detach().clone() for n, p in c.model.named_parameters()}
    with pytest.raises(SelectionError, match="units_within"):
        gs.ablate_(c.model, ~c.anatomy.neurons[:, :1])  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="holds no unit"):
        gs.ablate_(c.model, c.anatomy.neurons[:, :0])
    with pytest.raises(SelectionError, match="another model"):
        gs.ablate_(other.model, c.anatomy.neurons[:, :1])
    with pytest.raises(PlanError, match="reinit"):
        gs.ablate_(c.model, c.anatomy.neurons[:, :1], "gaussian")  # type: ignore[arg-type]
    assert all(torch.equal(p, before[n]) for n, p in c.model.named_parameters())


def test_riders_stay() -> None:
    """Output biases that ride along in ``rest`` belong to no unit."""
    c = case("gpt2")
    ablated = c.copy()
    rest = c.anatomy.rest(c.anatomy.neurons[:, -2:])
    gs.ablate_(ablated, rest)
    bias = "transformer.h.0.mlp.c_proj.bias"
    assert bias in rest.entries and torch.equal(ablated.get_parameter(bias), c.model.get_parameter(bias))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_shards_are_parts_of_the_whole(tmp_path: Path) -> None:
    """Two ranks under FSDP2, whose shards cut through units, write what one rank writes."""
    found = launch("tests.transforms.ranks", directory=tmp_path)
    assert len(found) == 6 and max(found.values()) <= 1e-6
