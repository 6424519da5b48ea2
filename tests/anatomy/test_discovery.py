"""Discovery on one tiny model of each architecture, judged by what the model itself computes."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradsurgery.anatomy.discover import discover
from gradsurgery.anatomy.discovery.inputs import dummy_inputs
from gradsurgery.errors import AnatomyError
from tests.zoo.builder import ZOO, build, build_any, runnable
from tests.zoo.check import check
from tests.zoo.sweep import MAPPINGS

warnings.filterwarnings("ignore", module="transformers")

#: name -> {kind: units in every layer that has the kind}; ``None``: see the test of that name.
EXPECTED = {
    "gpt_neo": {"head": 3, "neuron": 52},
    "gpt2": {"head": 3, "neuron": 52},
    "llama": {"head": 6, "kv_group": 3, "neuron": 52},
    "llama_mha": {"head": 6, "neuron": 52},
    "qwen3": {"head": 6, "kv_group": 3, "neuron": 52},
    "qwen2": {"head": 4, "kv_group": 2, "neuron": 52},
    "gemma3_text": {"head": 6, "kv_group": 3, "neuron": 52},
    "gemma3_mqa": {"head": 6, "kv_group": 1, "neuron": 52},
    "phi3": {"head": 4, "kv_group": 2, "neuron": 52},
    "gpt_neox": {"head": 4, "neuron": 52},
    "bloom": {"head": 5, "neuron": 160},
    "falcon_old": {"head": 4, "kv_group": 1, "neuron": 52},
    "falcon_new": {"head": 6, "kv_group": 2, "neuron": 52},
    "falcon_alibi": {"head": 4, "neuron": 160},
    "opt": {"head": 4, "neuron": 52},
    "mixtral": {"head": 6, "kv_group": 3, "neuron": 13, "expert": 5},
    "gpt_oss": {"head": 6, "kv_group": 3, "neuron": 13, "expert": 5},
    "olmo2": {"head": 4, "kv_group": 2, "neuron": 52},
    "mamba2": {"head": 6, "kv_group": 2},
    "mamba": {"neuron": 48, "latent": 2},
    "t5": {"head": 5, "neuron": 52},
    "bert": {"head": 4, "neuron": 52},
    "vit": {"head": 4, "neuron": 52},
}


def run(model):
    """Outputs in float64, and the largest tolerance that the model's own float32 parts ask for."""
    fed = dummy_inputs(model, batch=3, length=11, seed=5)
    return lambda m: next(v for v in m(**fed).values() if isinstance(v, torch.Tensor) and v.is_floating_point())


@pytest.mark.parametrize("name", ZOO)
def test_units_hold(name):
    model = build(name).double()
    found = discover(model)
    assert not check(model, run(model), found.groups, found.structural, tolerance=2e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_counts(name):
    found = discover(build(name))
    for group in found.groups:
        assert len(group) == EXPECTED[name][group.kind], group
    assert {g.kind for g in found.groups} == set(EXPECTED[name])
    layers = {g.layer for g in found.groups}
    assert layers == {0, 1, 2}
    per_layer = Counter((g.kind, g.layer, g.name) for g in found.groups)
    assert set(per_layer.values()) == {1}


def test_deepseek_v3():
    found = discover(build("deepseek_v3"))
    experts = [g for g in found.groups if g.kind == "expert"]
    assert [g.layer for g in experts] == [1, 2]
    assert all(g.exchange_classes == (0, 0, 1, 1, 2, 2, 3, 3) for g in experts)
    assert any(f.buffer for f in experts[0].footprints)
    neurons = [g for g in found.groups if g.kind == "neuron" and g.layer == 1]
    assert len(neurons) == 9
    assert {g.name for g in neurons} >= {"model.layers.1.mlp.experts.7", "model.layers.1.mlp.shared_experts"}
    latents = [g for g in found.groups if g.kind == "latent" and g.layer == 1]
    assert sorted(map(len, latents)) == [11, 14]  # keys and values, queries: permutable, coupled by their norms
    assert not any(g.closed for g in latents)


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_position_dependent_heads_are_alone(name):
    heads = [g for g in discover(build(name)).groups if g.kind == "head"]
    assert all(len(set(g.exchange_classes)) == len(g) and g.closed for g in heads)


def test_full_width_norms_open_a_group():
    groups = discover(build("olmo2")).groups
    assert {g.closed for g in groups if g.kind in ("head", "kv_group")} == {False}
    assert {g.closed for g in groups if g.kind == "neuron"} == {True}


def test_shared_bias_separates_heads():
    found = discover(build("t5"))
    own = [g for g in found.groups if g.kind == "head" and "SelfAttention" in g.name]
    cross = [g for g in found.groups if g.kind == "head" and "EncDec" in g.name]
    assert all(len(set(g.exchange_classes)) == 5 for g in own)
    assert all(len(set(g.exchange_classes)) == 1 for g in cross)
    assert "shared relative position bias" in found.structural.values()


def test_heads_know_their_group():
    groups = {(g.kind, g.layer): g for g in discover(build("llama")).groups}
    heads, shared = groups["head", 1], groups["kv_group", 1]
    assert heads.parent == shared.name
    assert heads.parent_units == (0, 0, 1, 1, 2, 2)


def test_the_model_is_untouched():
    model = build("llama").train()
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    discover(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 11), torch.nn.Linear(11, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def test_a_module_without_a_config():
    found = discover(Plain(), {"x": torch.randn(20, 6)})
    (group,) = found.groups
    assert (group.kind, len(group)) == ("neuron", 11)
    assert group.riders == ("down.bias",)


def test_unknown_inputs_are_an_error():
    with pytest.raises(AnatomyError, match="inputs"):
        discover(Plain())


#: Shapes (see the zoo's ``SHAPES``) in which an architecture is harder than in others.
HARD = [
    ("causal/longcat_flash", 1),  # few tokens for some expert, among experts that do nothing
    ("causal/qwen4_exp_text", 1),  # a state that decays at once
    ("causal/zaya", 2),  # one key head behind two convolutions
    ("causal/inkling2_text", 0),  # learned queries over layers
    ("causal/laguna", 1),  # an expert that the check's tokens do not choose
    ("image/pvt", 0),  # positions for pictures of another size
    ("image/levit", 1),  # keys through batch norms, which overflow without statistics of their own
    ("image/mobilevitv2", 1),  # a bias that the softmax ignores
]


@pytest.mark.parametrize(("name", "seed"), HARD)
def test_units_of_hard_shapes_hold(name, seed):
    mapping, kind = name.split("/")
    if kind not in CONFIG_MAPPING:
        pytest.skip("not in this release of transformers")
    model, outputs, tolerance = runnable(kind, MAPPINGS[mapping][0], seed)
    found = discover(model)
    assert not check(model, outputs, found.groups, found.structural, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_any_causal_architecture(kind):
    """Whatever is found holds; what is not understood is an error that says so."""
    try:
        model = build_any(kind).double()
        outputs = run(model)
        outputs(model)
    except Exception as error:
        pytest.skip(f"not built at tiny size: {type(error).__name__}")
    try:
        found = discover(model)
    except AnatomyError as error:
        pytest.xfail(str(error)[:200])
    assert not check(model, outputs, found.groups, found.structural, tolerance=2e-5)
