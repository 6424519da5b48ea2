"""Models that are examined on tiny twins: the same as what they show themselves, at any size, once per process."""

from __future__ import annotations

import copy
import types
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradsurgery.anatomy.discover import LARGEST_COPY, _by_twin, _direct, discover
from gradsurgery.anatomy.discovery import memory
from gradsurgery.anatomy.discovery.shrink import shrunken
from gradsurgery.errors import AnatomyError
from tests.zoo import configs
from tests.zoo.builder import build, build_any
from tests.zoo.configs import Shape

warnings.filterwarnings("ignore", module="transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

CAUSAL, PAIR = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
MASKED, IMAGE = "AutoModelForMaskedLM", "AutoModelForImageClassification"


@pytest.fixture(autouse=True)
def _forgetful():
    memory.forget()
    yield
    memory.forget()


# -- a twin and the model itself

#: More heads than a twin keeps, in groups; one key a head; few groups of many.
MANY = {
    "grouped": Shape(96, 16, 8, 6, (148, 124, 132, 164), 10, ssm_heads=16, ssm_groups=8),
    "own": Shape(96, 12, 12, 8, (148, 124, 132, 164), 9, ssm_heads=12, ssm_groups=1, biases=True, number=1),
    "few": Shape(144, 24, 4, 10, (148, 124, 132, 164), 6, ssm_heads=24, ssm_groups=4, number=2),
}
QUICK = [
    *((CAUSAL, kind, shape) for kind in ("llama", "mixtral", "falcon") for shape in MANY),
    *((CAUSAL, kind, "grouped") for kind in ("codegen", "gpt_neox", "bloom", "phi3", "gpt2", "deepseek_v3", "dbrx")),
    *((CAUSAL, kind, "grouped") for kind in ("gpt_oss", "mamba2", "gemma3_text", "apertus", "recurrent_gemma")),
    *((CAUSAL, kind, "grouped") for kind in ("olmo2", "falcon_h1")),
    (CAUSAL, "gemma3n_text", "own"),
    (PAIR, "t5", "own"),
    (PAIR, "bart", "grouped"),
    (MASKED, "bert", "grouped"),
    (IMAGE, "vit", "grouped"),
]


@pytest.fixture
def model_of(monkeypatch):
    def made(auto: str, kind: str, shape: str | int) -> nn.Module:
        if kind not in CONFIG_MAPPING:
            pytest.skip("not in this release of transformers")
        if isinstance(shape, int):
            return build_any(kind, auto, shape)
        monkeypatch.setattr(configs, "SHAPES", (MANY[shape],))
        return build_any(kind, auto)

    return made


def require_same(direct, carried):
    """Groups and reasons are equal, to the last index."""
    assert direct[1] == carried[1]
    assert [(g.kind, g.name) for g in direct[0]] == [(g.kind, g.name) for g in carried[0]]
    for one, other in zip(direct[0], carried[0], strict=True):
        for field in ("layer", "exchange_classes", "closed", "parent", "parent_units", "riders", "consumer_slots"):
            assert getattr(one, field) == getattr(other, field), (one, field)
        for a, b in zip(one.footprints, other.footprints, strict=True):
            assert (a.name, a.buffer, a.index.keys()) == (b.name, b.buffer, b.index.keys())
            assert all(np.array_equal(a.index[d], b.index[d]) for d in a.index), (one, a.name)


@pytest.mark.parametrize(("auto", "kind", "shape"), QUICK)
def test_a_twin_tells_what_the_model_itself_does(model_of, auto, kind, shape):
    model = model_of(auto, kind, shape)
    require_same(_direct(model, None), _by_twin(model))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*MANY, 0, 1, 2])
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_twin_of_any_causal_architecture(model_of, kind, shape):
    try:
        model = model_of(CAUSAL, kind, shape)
    except Exception as error:
        pytest.skip(f"not built: {error}")
    try:
        direct, carried = _direct(model, None), _by_twin(model)
    except AnatomyError as error:
        pytest.skip(f"refused: {error}")
    require_same(direct, carried)


# -- large models


def _sizes(hidden: int, layers: int, heads: int, groups: int, width: int, **more: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": width,
    } | more


MOE = {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
NEW = {"num_kv_heads": 8, "new_decoder_architecture": True}

#: name -> auto class, model type, config, {(kind, units, exchange classes): groups}
LARGE: dict[str, tuple[str, str, dict[str, Any], dict[tuple[str, int, int], int]]] = {
    "llama3_70b": (
        CAUSAL,
        "llama",
        _sizes(8192, 80, 64, 8, 28672),
        {("head", 64, 8): 80, ("kv_group", 8, 1): 80, ("neuron", 28672, 1): 80},
    ),
    "qwen25_half_b": (
        CAUSAL,
        "qwen2",
        _sizes(896, 24, 14, 2, 4864),
        {("head", 14, 2): 24, ("kv_group", 2, 1): 24, ("neuron", 4864, 1): 24},
    ),
    "qwen3_30b_a3b": (
        CAUSAL,
        "qwen3_moe",
        _sizes(2048, 48, 32, 4, 6144) | MOE,
        {("head", 32, 4): 48, ("kv_group", 4, 1): 48, ("neuron", 768, 1): 48 * 128, ("expert", 128, 1): 48},
    ),
    "mixtral_8x7b": (
        CAUSAL,
        "mixtral",
        _sizes(4096, 32, 32, 8, 14336, num_local_experts=8),
        {("head", 32, 8): 32, ("kv_group", 8, 1): 32, ("neuron", 14336, 1): 256, ("expert", 8, 1): 32},
    ),
    "deepseek_v3": (
        CAUSAL,
        "deepseek_v3",
        {},
        {("head", 128, 1): 61, ("latent", 1536, 1): 61, ("latent", 512, 1): 61, ("expert", 256, 8): 58}
        | {("neuron", 18432, 1): 3, ("neuron", 2048, 1): 58 * 257},
    ),
    "gpt_oss_20b": (
        CAUSAL,
        "gpt_oss",
        _sizes(2880, 24, 64, 8, 2880, head_dim=64, num_local_experts=32),
        {("head", 64, 8): 24, ("kv_group", 8, 1): 24, ("neuron", 2880, 1): 24 * 32, ("expert", 32, 1): 24},
    ),
    "gemma3_27b": (
        CAUSAL,
        "gemma3_text",
        _sizes(5376, 62, 32, 16, 21504, head_dim=128),
        {("head", 32, 16): 62, ("kv_group", 16, 1): 62, ("neuron", 21504, 1): 62},
    ),
    "falcon_40b": (
        CAUSAL,
        "falcon",
        {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128} | NEW,
        {("head", 128, 8): 60, ("kv_group", 8, 1): 60, ("neuron", 32768, 1): 60},
    ),
    "bloom_176b": (
        CAUSAL,
        "bloom",
        {"hidden_size": 14336, "n_layer": 70, "n_head": 112},
        {("head", 112, 112): 70, ("neuron", 57344, 1): 70},
    ),
    "gpt_neox_20b": (
        CAUSAL,
        "gpt_neox",
        {"hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64, "intermediate_size": 24576},
        {("head", 64, 1): 44, ("neuron", 24576, 1): 44},
    ),
    "phi4": (
        CAUSAL,
        "phi3",
        _sizes(5120, 40, 40, 10, 17920),
        {("head", 40, 10): 40, ("kv_group", 10, 1): 40, ("neuron", 17920, 1): 40},
    ),
    "mamba2_7b": (CAUSAL, "mamba2", {}, {("head", 128, 8): 64, ("kv_group", 8, 1): 64}),
    "t5_11b": (
        PAIR,
        "t5",
        {"d_model": 1024, "d_ff": 65536, "d_kv": 128, "num_layers": 24, "num_heads": 128},
        {("head", 128, 128): 48, ("head", 128, 1): 24, ("neuron", 65536, 1): 48},
    ),
    "bert_large": (
        MASKED,
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        {("head", 16, 1): 24, ("neuron", 4096, 1): 24},
    ),
    "vit_huge": (
        IMAGE,
        "vit",
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120},
        {("head", 16, 1): 32, ("neuron", 5120, 1): 32},
    ),
    "jamba_52b": (
        CAUSAL,
        "jamba",
        {},
        {("head", 32, 8): 4, ("kv_group", 8, 1): 4, ("neuron", 8192, 1): 28, ("latent", 256, 1): 28}
        | {("neuron", 14336, 1): 16 + 16 * 16, ("expert", 16, 1): 16},
    ),
    "qwen3_next_80b": (
        CAUSAL,
        "qwen3_next",
        {},
        {("head", 32, 16): 36, ("kv_group", 16, 1): 36, ("head", 16, 2): 12, ("kv_group", 2, 1): 12}
        | {("neuron", 512, 1): 48 * 513, ("expert", 512, 1): 48},
    ),
    "stablelm_3b": (CAUSAL, "stablelm", {}, {("head", 32, 1): 32, ("neuron", 6912, 1): 32}),
    "blt": (
        CAUSAL,
        "blt",
        {},
        {("head", 16, 1): 44, ("neuron", 2730, 1): 1, ("neuron", 1024, 1): 1}
        | {("neuron", 5632, 1): 25, ("neuron", 2816, 1): 9},
    ),
    "xlm": (CAUSAL, "xlm", {}, {("head", 16, 1): 12, ("neuron", 8192, 1): 12}),
    "xmod": (CAUSAL, "xmod", {}, {("head", 12, 1): 12, ("neuron", 3072, 1): 12, ("neuron", 384, 1): 12}),
    "switch_base_8": (
        PAIR,
        "switch_transformers",
        {},
        {("head", 12, 12): 24, ("head", 12, 1): 12, ("expert", 8, 1): 6, ("neuron", 2048, 1): 18 + 6 * 8},
    ),
    "t5gemma2": (
        PAIR,
        "t5gemma2",
        {},
        {("head", 8, 4): 52, ("kv_group", 4, 1): 52, ("neuron", 9216, 1): 52},
    ),
    "zamba2": (
        CAUSAL,
        "zamba2",
        {},
        {("head", 8, 1): 54, ("kv_group", 1, 1): 54, ("head", 32, 1): 1, ("neuron", 10240, 1): 1}
        | {("latent", 2560, 1): 1, ("latent", 128, 1): 9},
    ),
    "deepseek_v4": (
        CAUSAL,
        "deepseek_v4",
        {},
        {("head", 64, 8): 43, ("kv_group", 1, 1): 43, ("latent", 1024, 1): 43, ("neuron", 8192, 8): 43}
        | {("expert", 256, 256): 3, ("expert", 256, 1): 40, ("neuron", 2048, 1): 43 * 257},
    ),
}
HEAVY = ("jamba_52b", "qwen3_next_80b", "deepseek_v4")


def on_meta(auto: str, kind: str, fields: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(CONFIG_MAPPING[kind](**fields))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in HEAVY else []) for n in LARGE])
def test_a_large_model_on_meta(name):
    auto, kind, fields, expected = LARGE[name]
    if kind not in CONFIG_MAPPING:
        pytest.skip("not in this release of transformers")
    model = on_meta(auto, kind, fields)
    found = discover(model)
    assert dict(Counter((g.kind, len(g), len(set(g.exchange_classes))) for g in found.groups)) == expected
    shapes = {n: p.shape for n, p in [*model.named_parameters(), *model.named_buffers()]}
    for group in found.groups[:: max(1, len(found.groups) // 40)]:
        for name_, index in group.units[-1]:
            assert all(max(rows) < shapes[name_][dim] for dim, rows in index.items())


def test_seventy_billion_on_meta():
    found = discover(on_meta(*LARGE["llama3_70b"][:3]))
    assert found.seconds < 10
    heads = next(g for g in found.groups if g.kind == "head" and g.layer == 79)
    assert heads.units[63][0] == ("model.layers.79.self_attn.q_proj.weight", {0: tuple(range(8064, 8192))})


def test_a_config_that_does_not_run_is_an_error_with_a_reason():
    model = on_meta(CAUSAL, "reformer", {"is_decoder": True})
    assert sum(p.numel() for p in model.parameters()) < LARGEST_COPY
    with pytest.raises(AnatomyError, match="cannot be built at small size"):
        discover(model)


# -- small configs


def test_one_layer_of_every_kind_stays():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=36, layer_types=kinds * 6)
    small = shrunken(config)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.num_hidden_layers == 2


def test_layers_that_share_keys_keep_a_source_of_every_kind():
    config = CONFIG_MAPPING["gemma3n_text"]()
    small = shrunken(config)
    shared = small.num_kv_shared_layers
    own, reading = small.layer_types[:-shared], small.layer_types[-shared:]
    assert set(reading) == {"sliding_attention", "full_attention"}
    assert min(Counter(own)[kind] for kind in set(reading)) > 1  # one that others read, one that none reads


def test_kinds_that_come_with_the_layers_number_keep_the_first_layers():
    config = CONFIG_MAPPING["jamba"]()
    kinds = [
        ("attention" if i % 8 == 4 else "mamba", "experts" if i % 2 else "dense")
        for i in range(config.num_hidden_layers)
    ]
    assert shrunken(config, kinds=[kinds]).num_hidden_layers == 5


def test_numbers_of_layers_are_numbers_of_layers_that_stay():
    config = CONFIG_MAPPING["qwen3_moe"](num_hidden_layers=12, mlp_only_layers=[0, 7], decoder_sparse_step=1)
    small = shrunken(config)
    assert small.mlp_only_layers == [0]
    assert small.num_hidden_layers == 2


@pytest.mark.parametrize("step", [0, 1, 2])
def test_ratios_of_heads_stay(step):
    config = CONFIG_MAPPING["llama"](hidden_size=8192, num_attention_heads=64, num_key_value_heads=8)
    small = shrunken(config, step)
    assert small.num_attention_heads == 8 * small.num_key_value_heads
    assert (small.num_attention_heads == 64) == (step == 2)
    assert small.hidden_size == small.num_attention_heads * small.head_dim
    assert config.hidden_size == 8192


def test_heads_without_a_small_divisor_become_few():
    assert shrunken(CONFIG_MAPPING["falcon"](num_attention_heads=71, hidden_size=71 * 64)).num_attention_heads == 4


# -- what was found is kept


def test_an_equal_model_is_not_examined_again():
    first, again = discover(build("llama")), discover(build("llama", seed=1))
    assert again.seconds < first.seconds / 10
    require_same((first.groups, first.structural), (again.groups, again.structural))


def test_a_larger_model_of_the_same_make_shares_the_twin(monkeypatch):
    discover(on_meta(*LARGE["llama3_70b"][:3]))
    monkeypatch.setattr("gradsurgery.anatomy.discover._probed", None)
    found = discover(on_meta(CAUSAL, "llama", _sizes(4096, 32, 64, 8, 14336)))
    assert {len(g) for g in found.groups} == {64, 8, 14336}


def test_what_is_handed_out_may_be_changed():
    for model in (build("llama"), on_meta(*LARGE["qwen25_half_b"][:3])):
        expected = discover(model)
        wanted = copy.deepcopy((expected.groups, expected.structural))
        for found in (expected, discover(model)):
            found.structural.clear()
            for group in found.groups:
                for footprint in group.footprints:
                    for rows in footprint.index.values():
                        rows[...] = -1
                    footprint.index.clear()
        again = discover(model)
        require_same(wanted, (again.groups, again.structural))


def examined(monkeypatch) -> list[nn.Module]:
    """Models that were probed from now on."""
    from gradsurgery.anatomy import discover as module

    seen: list[nn.Module] = []
    probe = module._probed

    def probed(model, *more, **named):
        seen.append(model)
        return probe(model, *more, **named)

    monkeypatch.setattr(module, "_probed", probed)
    return seen


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def given_a_forward(model):
    layer = model.model.layers[0].mlp
    layer.forward = types.MethodType(type(layer).forward, layer)


def given_another_config(model):
    model.config.rms_norm_eps = 1e-3


def given_another_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()


def given_another_number(model):
    model.model.layers[0].self_attn.scaling = 0.5


def parametrised(model):
    nn.utils.parametrizations.orthogonal(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize(
    "change",
    [hooked, given_a_forward, given_another_config, given_another_activation, given_another_number, parametrised],
)
def test_a_changed_model_is_examined(monkeypatch, change):
    discover(build("llama"))
    seen = examined(monkeypatch)
    model = build("llama")
    change(model)
    discover(model)
    assert len(seen) == 1


def test_other_heads_of_the_same_shapes_are_examined():
    fields = {"hidden_size": 48, "intermediate_size": 52, "vocab_size": 97, "num_hidden_layers": 2}
    for heads in (4, 6):
        config = CONFIG_MAPPING["gpt_neox"](**fields, num_attention_heads=heads, pad_token_id=0)
        found = discover(transformers.AutoModelForCausalLM.from_config(config))
        assert {len(g) for g in found.groups if g.kind == "head"} == {heads}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("place", ["method", "function"])
def test_replaced_code_is_examined(monkeypatch, place, large):
    from transformers.models.llama import modeling_llama as code

    model = on_meta(*LARGE["llama3_70b"][:3]) if large else build("llama")
    discover(model)
    seen = examined(monkeypatch)
    if place == "method":
        forward = code.LlamaMLP.forward
        monkeypatch.setattr(code.LlamaMLP, "forward", lambda self, x: forward(self, x))
    else:
        rotate = code.rotate_half
        monkeypatch.setattr(code, "rotate_half", lambda x: rotate(x))
    discover(model)
    assert len(seen) == (2 if large else 1)


def test_other_arguments_are_examined(monkeypatch):
    model = build("llama")
    discover(model)
    seen = examined(monkeypatch)
    discover(model, structural=["lm_head"])
    discover(model, inputs={"input_ids": torch.arange(3, 21).reshape(2, 9)})
    assert len(seen) == 2
    discover(model)
    assert len(seen) == 2


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(memory, "MOST", 2)
    for key in "abc":
        memory.recall(key, lambda: [1])
    assert memory.recall("c", lambda: [2]) == [1]
    assert memory.recall("a", lambda: [2]) == [2]
    assert memory.recall(None, lambda: [3]) == [3]
    assert memory.recall(None, lambda: [4]) == [4]
