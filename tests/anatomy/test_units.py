"""Indexing of units, their algebra, and what belongs to them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from conftest import tiny_llama
from gradsurgery.anatomy.entries import Entries
from gradsurgery.errors import SelectionError
from tests.anatomy.anatomies import anatomy_of

NAMES = ["gpt2", "llama", "phi3", "mixtral", "gpt_oss", "bert"]


def region_of(anatomy: gs.Anatomy, kind: str, wanted: dict[tuple[int, str], set[int]]) -> gs.Region:
    """The slices of some units, put together one by one."""
    out = gs.Region(anatomy.space, {})
    for group in anatomy.groups:
        for unit in wanted.get((group.layer, group.name), set()) if group.kind == kind else ():
            for footprint, (name, index) in zip(group.footprints, group.units[unit], strict=True):
                if not footprint.buffer:
                    shape = anatomy.space.shapes[anatomy.space.canonical(name)]
                    out |= gs.Region(anatomy.space, {name: Entries.box(shape, index)})
    return out


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_neurons_are_their_slices(name: str, data: st.DataObject) -> None:
    anatomy = anatomy_of(name)
    size = len(next(g for g in anatomy.groups if g.kind == "neuron"))
    layers = data.draw(st.sets(st.integers(0, 2), min_size=1))
    chosen = data.draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=6))
    found = anatomy.neurons[sorted(layers), chosen]
    keys = [(g.layer, g.name) for g in anatomy.groups if g.kind == "neuron" and g.layer in layers]
    wanted = {key: {u % size for u in chosen} for key in keys}
    assert found == region_of(anatomy, "neuron", wanted)
    assert found.count == sum(map(len, wanted.values()))
    assert {(g.layer, g.name): set(u.tolist()) for g, u in found.groups} == wanted


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_units_algebra_is_about_units(name: str, data: st.DataObject) -> None:
    anatomy = anatomy_of(name)
    some = st.lists(st.integers(0, 2), max_size=3)

    def draw() -> gs.Region:
        heads = np.array(data.draw(some), dtype=int)
        return anatomy.heads[:, heads] | anatomy.neurons[0, : data.draw(st.integers(0, 4))]

    a, b = draw(), draw()

    def sets(units: gs.Region) -> set[tuple[int, str, int]]:
        assert isinstance(units, gs.Units)
        return {(g.layer, f"{g.kind} {g.name}", int(u)) for g, chosen in units.groups for u in chosen}

    assert sets(a | b) == sets(a) | sets(b)
    assert sets(a & b) == sets(a) & sets(b)
    assert sets(a - b) == sets(a) - sets(b)
    assert not isinstance(~a, gs.Units) and (~a) == gs.Region.whole(anatomy.space) - gs.Region(anatomy.space, a.entries)
    assert type(a & ~b) is gs.Region and type(a | ~b) is gs.Region


def test_layers_are_absolute_and_slices_skip() -> None:
    anatomy = anatomy_of("deepseek_v3")  # layer 0 is dense
    assert {g.layer for g, _ in anatomy.experts[:, 0].groups} == {1, 2}
    assert {g.layer for g, _ in anatomy.experts[1:, 0].groups} == {1, 2}
    assert {g.layer for g, _ in anatomy.experts[-1, 0].groups} == {2}
    with pytest.raises(SelectionError, match=r"no experts in layer 0: layers 1-2"):
        anatomy.experts[0, :]
    with pytest.raises(SelectionError, match=r"no experts in layer 0"):
        anatomy.experts[[0, 1], :]
    with pytest.raises(SelectionError, match="layer 7"):
        anatomy.heads[7, 0]
    with pytest.raises(SelectionError, match="layers 1-2"):
        anatomy.experts[:1, :]


def test_an_index_that_finds_nothing_names_what_there_is() -> None:
    anatomy = anatomy_of("gpt2")
    with pytest.raises(
        SelectionError, match=r"heads\[:, 12\] selects nothing: layers 0-2 of GPT2LMHeadModel have heads 0-2"
    ):
        anatomy.heads[:, 12]
    with pytest.raises(SelectionError, match="selects nothing"):
        anatomy.heads[:, [3, 4]]
    with pytest.raises(SelectionError, match="has no experts"):
        anatomy.experts[:, 0]
    with pytest.raises(SelectionError, match=r"\[layers, units\]"):
        anatomy.heads[0]  # type: ignore[index]
    assert not anatomy.heads[:, 12:] and not anatomy.heads[:, :0]


def test_minus_one_counts_within_each_group() -> None:
    anatomy = anatomy_of("bart")  # 4 encoder heads, 5 decoder heads
    for group, units in anatomy.heads[:, -1].groups:
        assert units.tolist() == [len(group) - 1]
    assert {len(g) for g, _ in anatomy.heads[:, -1].groups} == {4, 5}
    with_five = anatomy.heads[:, 4]
    assert {len(g) for g, _ in with_five.groups} == {5}


def test_ways_to_index() -> None:
    anatomy = anatomy_of("llama")
    wanted = anatomy.neurons[1, [2, 5]]
    flags = torch.zeros(52, dtype=torch.bool)
    flags[[2, 5]] = True
    for layer in (1, -2, [1], np.int64(1), torch.tensor([1]), np.array([False, True, False]), slice(1, 2)):
        for units in (
            [2, 5],
            [5, 2, 2],
            (2, -47),
            np.array([2, 5]),
            torch.tensor([5, 2]),
            flags,
            flags.numpy(),
            slice(2, 6, 3),
        ):
            assert anatomy.neurons[layer, units] == wanted
    with pytest.raises(SelectionError, match="does not fit"):
        anatomy.neurons[1, flags[:-1]]
    assert anatomy.neurons[1:, :10][:2, 5:] == anatomy.neurons[1, 5:10]


def test_kv_groups_and_shared_rows(caplog: pytest.LogCaptureFixture) -> None:
    anatomy = gs.Anatomy(anatomy_of("llama").space, anatomy_of("llama").groups)
    k = "model.layers.0.self_attn.k_proj.weight"
    with caplog.at_level(logging.WARNING, "gradsurgery"):
        alone = anatomy.heads[0, 0]
        assert k not in alone.entries
        assert anatomy.heads[1, 0].numel() == alone.numel()
    assert len(caplog.records) == 1 and "kv_groups" in caplog.text
    both = anatomy.heads[0, :2]
    assert both == anatomy.kv_groups[0, 0] == anatomy.heads[0, 0] | anatomy.heads[0, 1]
    assert both.of(k).numel() == 10 * 42 and both.count == anatomy.kv_groups[0, 0].count == 2
    assert (both - anatomy.heads[0, 0]) == anatomy.heads[0, 1]
    mixed = anatomy.heads[0, 1:]  # one head of group 0, groups 1 and 2 whole
    assert mixed.of(k) == anatomy.kv_groups[0, 1:].of(k)
    assert anatomy.rest(both) == anatomy.kv_groups[0, 1:]
    assert anatomy.rest(alone).of(k) == anatomy.kv_groups[0, 1:].of(k)
    with pytest.raises(SelectionError, match="kv_groups 0-2"):
        anatomy.kv_groups[:, 3]
    same = anatomy_of("llama_mha")
    assert same.kv_groups[:, 1] == same.heads[:, 1]


def test_rest_and_riders() -> None:
    anatomy = anatomy_of("gpt2")
    forget = anatomy.heads[1, -1:] | anatomy.neurons[1, :4]
    rest = anatomy.rest(forget)
    assert {(g.kind, g.layer, len(u)) for g, u in rest.groups} == {("head", 1, 2), ("neuron", 1, 48)}
    biases = {"transformer.h.1.attn.c_proj.bias", "transformer.h.1.mlp.c_proj.bias"}
    assert rest.riders is not None and set(rest.riders.parameters()) == biases <= set(rest.entries)
    assert not biases & set(forget.entries) and not rest & forget
    assert (rest | forget).numel() == rest.numel() + forget.numel()
    only = anatomy.rest(anatomy.heads[1, -1:])
    assert only.riders is not None and set(only.riders.parameters()) == {"transformer.h.1.attn.c_proj.bias"}
    everything = anatomy.rest(anatomy.heads)
    assert everything.count == 0
    with pytest.raises(SelectionError, match="units_within"):
        anatomy.rest(~forget)
    with pytest.raises(SelectionError, match="holds no unit"):
        anatomy.rest(anatomy.heads[:, :0])


def test_rest_of_neurons_stays_inside_their_experts() -> None:
    anatomy = anatomy_of("mixtral")
    one = anatomy.neurons.named("model.layers.1.mlp.experts.3")[:, :5]
    rest = anatomy.rest(one)
    assert [(g.name, len(u)) for g, u in rest.groups] == [("model.layers.1.mlp.experts.3", 8)]
    assert all("router" not in name and "gate.weight" not in name for name in rest.entries)
    assert "model.layers.1.mlp.gate.weight" in anatomy.experts[1, 0].entries


def test_named_narrows() -> None:
    anatomy = anatomy_of("t5")
    cross = anatomy.heads.named("decoder*EncDecAttention*")
    own = anatomy.heads.named("decoder*SelfAttention*")
    encoder = anatomy.heads.named("encoder*")
    assert not cross & own and cross.count == own.count == encoder.count == 15
    assert (cross | own | encoder).count == anatomy.heads.count
    with pytest.raises(SelectionError, match="no group is named like"):
        anatomy.heads.named("vision*")


@pytest.mark.parametrize("name", NAMES)
def test_units_within(name: str) -> None:
    anatomy = anatomy_of(name)
    chosen = anatomy.heads[1, 1:] | anatomy.neurons[:, 3:7]
    within = anatomy.units_within(gs.Region(anatomy.space, chosen.entries))
    assert isinstance(within, gs.Units) and within == gs.Region(anatomy.space, chosen.entries)
    assert within.count == chosen.count
    assert anatomy.units_within(chosen.consumers).count == 0
    assert anatomy.units_within(gs.Region.whole(anatomy.space)).count == sum(
        len(g) for g in anatomy.groups if g.kind != "kv_group"
    )


def test_experts_and_their_neurons_overlap_as_regions() -> None:
    anatomy = anatomy_of("mixtral")
    expert, neurons = anatomy.experts[1, 3], anatomy.neurons.named("*layers.1.mlp.experts.3")
    assert (expert & neurons) == gs.Region(anatomy.space, neurons.entries)
    assert set((expert - neurons).parameters()) == {"model.layers.1.mlp.gate.weight"}
    assert isinstance(expert | neurons, gs.Units)


def test_regions_of_other_models_do_not_mix() -> None:
    with pytest.raises(SelectionError, match="another model"):
        anatomy_of("llama").heads[:, 0] | anatomy_of("gpt2").heads[:, 0]
    with pytest.raises(SelectionError, match="another model"):
        anatomy_of("llama").rest(anatomy_of("gpt2").heads[:, 0])


def test_text_of_indexed_and_named_unions_reads_back() -> None:
    anatomy = anatomy_of("llama")
    both, later = anatomy.heads | anatomy.neurons, anatomy.heads - anatomy.heads[0, :]
    assert isinstance(later, gs.Units)
    for region in (
        both[:, -1:],
        both[0, [0, 1]],
        both.named("*mlp*"),
        later[:, :2],
        both[:, 1:][0, :2],
    ):
        assert anatomy.select(region.text) == region, region.text


def test_riders_stay_with_their_groups() -> None:
    anatomy = anatomy_of("gpt2")
    rest = anatomy.rest(anatomy.heads[:, -1:] | anatomy.neurons[:, -2:])
    assert rest[:, :] == rest
    mlp = rest.named("*mlp*")
    assert "transformer.h.0.mlp.c_proj.bias" in mlp and "transformer.h.0.attn.c_proj.bias" not in mlp


def test_experts_and_the_neurons_inside_them_meet_as_entries() -> None:
    anatomy = anatomy_of("mixtral")
    neurons, mixed = anatomy.neurons[0, :], anatomy.neurons[0, :2] | anatomy.experts[0, :]
    assert (neurons & mixed) == neurons
    assert not (neurons - mixed)


@pytest.mark.parametrize("index", [torch.tensor([0.9, 1.7]), [0.5], True, [0, 9999], "0", [True, False]], ids=str)
def test_bad_indices_are_refused(index) -> None:
    with pytest.raises(SelectionError):
        anatomy_of("llama").neurons[0, index]


def test_units_within_never_reach_beyond_the_region() -> None:
    model = tiny_llama()
    anatomy = gs.dissect(model)
    region = gs.region(model, ["q_proj", "o_proj"])
    assert anatomy.units_within(region) in region
    assert anatomy.units_within(gs.region(model, "self_attn")) == anatomy.kv_groups[:, :]


def test_equal_shapes_with_other_heads_are_another_model() -> None:
    one, other = tiny_llama(), tiny_llama(heads=2, kv=1)
    assert {n: p.shape for n, p in one.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    with pytest.raises(SelectionError, match="head"):
        _ = gs.dissect(one).heads | gs.dissect(other).heads
