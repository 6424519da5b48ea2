"""Layer-wise learning rates: every trained parameter in one group, by depth, on models of many layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError

SMALL = {"vocab_size": 23, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "pad_token_id": 0}
LAYERS = 5


def of(kind: str, **more: Any) -> Any:
    return transformers.CONFIG_MAPPING[kind](**more)


BUILD: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(of("llama", num_hidden_layers=LAYERS, **SMALL)),
    "tied llama": lambda: transformers.LlamaForCausalLM(
        of("llama", num_hidden_layers=LAYERS, tie_word_embeddings=True, **SMALL)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        of("gpt2", vocab_size=23, n_embd=8, n_layer=LAYERS, n_head=2, n_positions=8)
    ),
    "opt": lambda: transformers.OPTForCausalLM(  # its final norm stands before the blocks
        of(
            "opt",
            vocab_size=23,
            hidden_size=8,
            word_embed_proj_dim=8,
            ffn_dim=8,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(of("bert", num_hidden_layers=LAYERS, **SMALL)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        of("t5", vocab_size=23, d_model=8, d_kv=4, d_ff=8, num_layers=LAYERS, num_decoder_layers=3, num_heads=2)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        of("mixtral", num_hidden_layers=LAYERS, num_key_value_heads=1, num_local_experts=3, **SMALL)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        of("mamba", vocab_size=23, hidden_size=8, state_size=4, num_hidden_layers=LAYERS)
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        of("swin", image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        of(
            "vit",
            image_size=8,
            patch_size=4,
            num_hidden_layers=LAYERS,
            **{k: v for k, v in SMALL.items() if "_id" not in k and "voc" not in k},
        )
    ),
    "sequential": lambda: nn.Sequential(
        nn.Linear(4, 8),
        nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(LAYERS))),
        nn.Linear(8, 2),
    ),
}
MODELS = {name: make() for name, make in BUILD.items()}
FACTORS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]), min_size=1, max_size=6)


def located(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Group by parameter name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(MODELS)), depth=FACTORS, head=st.floats(0, 2), frozen=st.integers(0, 4))
def test_every_trained_parameter_is_in_one_group(kind: str, depth: list[float], head: float, frozen: int) -> None:
    model = MODELS[kind]
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(not frozen or k % frozen != 0 or k == 0)
    groups = gs.parameter_groups(model, 0.1, depth, head=head, weight_decay=0.3)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    rates = {"embeddings": depth[0], "head": head}
    rates |= {f"blocks {k + 1}/{len(depth)}": factor for k, factor in enumerate(depth)}
    for name, group in located(model, groups).items():
        assert group["lr"] == 0.1 * rates[group["name"]]
        parameter = model.get_parameter(name)
        assert group["weight_decay"] == (0.3 if parameter.dim() > 1 else 0.0)
    for p in model.parameters():
        p.requires_grad_(True)
    torch.optim.AdamW(groups)


def expected(kind: str, parts: int) -> dict[str, str]:
    """Place by a piece of the name, for the models whose layers can be read off it."""
    layers = {
        "llama": "model.layers.{}.",
        "tied llama": "model.layers.{}.",
        "gpt2": "transformer.h.{}.",
        "bert": "bert.encoder.layer.{}.",
        "opt": "model.decoder.layers.{}.",
        "mixtral": "model.layers.{}.",
        "mamba": "backbone.layers.{}.",
        "vit": "vit.layers.{}."
        if any("vit.layers." in n for n, _ in MODELS["vit"].named_parameters())
        else "vit.encoder.layer.{}.",
        "sequential": "1.{}.",
    }[kind]
    out = {layers.format(i): f"blocks {min(int(i / (LAYERS / parts)), parts - 1) + 1}/{parts}" for i in range(LAYERS)}
    before = {"bert": ["bert.embeddings"], "gpt2": ["transformer.wte", "transformer.wpe"], "vit": ["vit.embeddings"]}
    before["opt"] = ["model.decoder.embed_tokens", "model.decoder.embed_positions"]
    for name in before.get(kind, ["0."] if kind == "sequential" else ["model.embed_tokens", "backbone.embeddings"]):
        out[name] = "embeddings"
    return out


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", sorted(set(MODELS) - {"t5", "swin"}))
def test_places_are_those_that_names_tell(kind: str, parts: int) -> None:
    model = MODELS[kind]
    groups = gs.parameter_groups(model, 1.0, [k + 1.0 for k in range(parts)])
    places = expected(kind, parts)
    for name, group in located(model, groups).items():
        place = next((place for piece, place in places.items() if name.startswith(piece)), "head")
        assert group["name"] == place, name


def test_every_stack_has_its_own_depth() -> None:
    found = located(MODELS["t5"], gs.parameter_groups(MODELS["t5"], 1.0))
    for stack, length in (("encoder", LAYERS), ("decoder", 3)):
        for i in range(length):
            names = {group["name"] for name, group in found.items() if name.startswith(f"{stack}.block.{i}.")}
            assert names == {f"blocks {4 * i // length + 1}/4"}
    assert found["shared.weight"]["name"] == "embeddings"
    stages = located(MODELS["swin"], gs.parameter_groups(MODELS["swin"], 1.0, (1.0, 2.0, 3.0)))
    for i in range(3):
        assert {g["name"] for n, g in stages.items() if f"layers.{i}." in n} == {f"blocks {i + 1}/3"}


def test_tied_weights_once_with_the_embeddings() -> None:
    model = MODELS["tied llama"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = located(model, gs.parameter_groups(model, 1.0, embeddings=0.125))
    assert found["model.embed_tokens.weight"]["lr"] == 0.125
    assert sum(p is model.lm_head.weight for g in gs.parameter_groups(model, 1.0) for p in g["params"]) == 1


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_no_decay(kind: str) -> None:
    model = MODELS[kind]
    assert all(group["weight_decay"] == 0.5 for group in gs.parameter_groups(model, 1.0, weight_decay=0.5, no_decay=()))
    names = [name for name, _ in model.named_parameters()][::2]
    for given_as in (names, gs.region(model, names)):
        found = located(model, gs.parameter_groups(model, 1.0, weight_decay=0.5, no_decay=given_as))
        assert {name for name, group in found.items() if not group["weight_decay"]} == set(names)


def test_wrappers_are_seen_through() -> None:
    model = MODELS["llama"]
    groups = gs.parameter_groups(torch.compile(model, backend="eager"), 1.0)  # type: ignore[arg-type]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_the_seeds_rates() -> None:
    """Embeddings and the first quarter 0.25, then 0.5, 0.75, 1.0; norm and head 1.0."""
    model = transformers.LlamaForCausalLM(of("llama", num_hidden_layers=18, **SMALL))
    found = located(model, gs.parameter_groups(model, 1e-5, weight_decay=0.01, no_decay=()))
    for name, group in found.items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        factor = 0.25 if "embed" in name else 1.0 if layer is None else [0.25, 0.5, 0.75, 1.0][int(layer / 4.5)]
        assert group["lr"] == 1e-5 * factor, name


def test_refusals() -> None:
    model = MODELS["llama"]
    for options in ({"lr": -1.0}, {"depth": ()}, {"depth": (0.5, -1)}, {"head": float("nan")}, {"embeddings": "0"}):
        with pytest.raises(PlanError, match="parameter_groups"):
            gs.parameter_groups(model, **{"lr": 1.0, **options})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no list of blocks"):
        gs.parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 1.0)
    with pytest.raises(SelectionError, match="parts of"):
        gs.parameter_groups(model, 1.0, no_decay=gs.dissect(model).neurons[0, :2])
    with pytest.raises(SelectionError, match="matches no parameter"):
        gs.parameter_groups(model, 1.0, no_decay="layernorm")
    frozen = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])
    holder = nn.ModuleDict({"blocks": frozen}).requires_grad_(False)
    with pytest.raises(SelectionError, match="trains"):
        gs.parameter_groups(holder, 1.0)
