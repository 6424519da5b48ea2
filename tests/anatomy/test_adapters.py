"""PEFT models: the units of the base with the adapter's rows and columns, and the ranks as latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.anatomy.discovery.inputs import dummy_inputs
from gradsurgery.errors import SelectionError
from tests.anatomy.wrapped import ADAPTER, adapted, assert_untouched, base_units, inner_outputs, state_of
from tests.zoo.builder import build
from tests.zoo.check import check
from tests.zoo.older import older_than

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama q v": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama": ("llama", {}),
    "llama dropout": ("llama", {"lora_dropout": 0.3, "use_rslora": True}),
    "llama dora": ("llama", {"use_dora": True}),
    "llama bias": ("llama_mha", {"lora_bias": True, "bias": "all"}),
    "llama one layer": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "gpt2": ("gpt2", {"fan_in_fan_out": True}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "bart": ("bart", {}),
    "t5": ("t5", {"target_modules": ["q", "v", "wo"]}),
    "vit": ("vit", {}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "mixtral experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "gpt_oss experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "deepseek_v3": ("deepseek_v3", {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "up_proj"]}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


def latents(anatomy: gs.Anatomy, adapter: str) -> list:
    return [g for g in anatomy.groups if g.kind == "latent" and f".{adapter}." in f"{g.units[0][0][0]}."]


@pytest.mark.parametrize("case", ADAPTERS)
def test_units_of_the_base_and_ranks(case: str) -> None:
    name, config = ADAPTERS[case]
    if case == "deepseek_v3" and older_than("5.13"):
        pytest.skip("blocks of this transformers read a buffer of their router, which PEFT's wrapper hides")
    model = adapted(name, **config)
    before = state_of(model)
    anatomy = gs.dissect(model)
    assert_untouched(before, model)
    assert base_units(anatomy) == base_units(gs.dissect(build(name).double()))
    assert not check(model, inner_outputs(model), anatomy.groups, anatomy.structural, tolerance=2e-5)
    held = {slices[0] for group in anatomy.groups for slices in group.units[0]}
    loose = [n for n, p in model.named_parameters() if ADAPTER.search(n) and p.ndim > 1 and n not in held]
    assert {anatomy.structural[n] for n in loose} <= {"outside the blocks", "embedding"}
    for group in latents(anatomy, "default"):
        # by name: in PEFT 0.18, an expert's A writes and its B reads; two fused weights have twice the rank
        ((first, rows), (second, columns)) = sorted(group.units[3], key=lambda part: part[0])
        assert "lora_A" in first and "lora_B" in second and len(group) in (5, 10)
        ((row,), (column,)) = rows[0], columns[1]
        expert, rank = divmod(row, len(group))
        assert rank == 3 and column == rank * (len(model.get_parameter(first)) // len(group)) + expert


def test_heads_hold_the_rows_of_the_adapter() -> None:
    anatomy = gs.dissect(adapted("llama"))
    head = anatomy.heads[1, 2]
    group, _ = next(head.groups)
    names = {name.split("self_attn.")[1]: index for name, index in group.units[2]}
    assert names["q_proj.lora_B.default.weight"] == {0: tuple(range(20, 30))}
    assert names["q_proj.base_layer.weight"] == {0: tuple(range(20, 30))}
    consumed = {name.split("self_attn.")[1]: index for name, index in group.consumers[2]}
    assert consumed.keys() == {"o_proj.base_layer.weight", "o_proj.lora_A.default.weight"}
    assert set(map(str, consumed.values())) == {str({1: tuple(range(20, 30))})}


def test_every_adapter_is_examined() -> None:
    """Those that are not active, switched off or merged, too: one group of ranks an adapter and layer."""
    model = adapted("llama", "one", "two", target_modules=["q_proj", "down_proj"])
    anatomy = gs.dissect(model)
    assert [len(latents(anatomy, name)) for name in ("one", "two")] == [6, 6]
    model.base_model.disable_adapter_layers()
    assert gs.dissect(model) == anatomy
    model.base_model.enable_adapter_layers()
    model.merge_adapter(["one"])
    assert gs.dissect(model) == anatomy
    model.unmerge_adapter()
    model.base_model.set_adapter(["one", "two"])
    assert not check(model, inner_outputs(model), anatomy.groups, anatomy.structural, tolerance=2e-5)
    merged = model.merge_and_unload()
    assert base_units(gs.dissect(merged)) == base_units(anatomy)


def test_the_model_inside() -> None:
    """The same units under the inner names, whether the adapter came by PEFT or by ``model.add_adapter``."""
    outer, other = adapted("llama"), build("llama")
    other.add_adapter(peft.LoraConfig(r=5, target_modules="all-linear"))  # type: ignore[operator]
    whole = gs.dissect(outer)
    for inner in (outer.base_model.model, other):
        anatomy = gs.dissect(inner)
        strip = lambda name: name.removeprefix("base_model.model.")  # noqa: E731
        assert [strip(g.name) for g in whole.groups] == [g.name for g in anatomy.groups]
        assert {strip(n) for n in whole.space.shapes} == anatomy.space.shapes.keys()
        assert base_units(anatomy) == base_units(whole)


LARGE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
LARGE |= {"intermediate_size": 1024, "num_hidden_layers": 3, "vocab_size": 512}


@pytest.mark.parametrize(("place", "layers"), [("cpu", None), ("meta", None), ("meta", [0, 2])])
def test_large_models_are_examined_on_an_adapted_twin(place: str, layers: list[int] | None) -> None:
    import transformers

    config = transformers.CONFIG_MAPPING["llama"](**LARGE)
    with torch.device(place):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        wanted = base_units(gs.dissect(model))
        lora = peft.LoraConfig(r=16, target_modules=["q_proj", "down_proj"], layers_to_transform=layers)
        model = peft.get_peft_model(model, lora)
    anatomy = gs.dissect(model)
    assert base_units(anatomy) == wanted
    assert [(g.layer, len(g)) for g in latents(anatomy, "default")] == [
        (k, 16) for k in layers or range(3) for _ in "qd"
    ]
    (slot,) = [f for f in anatomy.groups[0].footprints if "lora_B" in f.name]
    assert slot.index[0].shape == (8, 64)


def test_regions_of_an_adapted_model_work() -> None:
    model = adapted("llama", target_modules=["q_proj", "up_proj", "down_proj"])
    anatomy = gs.dissect(model)
    fed = dummy_inputs(model)
    labels = fed["input_ids"]
    masked = anatomy.neurons[:, :20]
    with gs.applied(model, gs.mask(masked)):
        model(**fed, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        inside = masked.of(name).mask() if name in masked else torch.zeros(parameter.shape, dtype=torch.bool)
        assert (parameter.grad[inside] == 0).all() and (parameter.grad[~inside] != 0).any()
    ablated = adapted("llama", target_modules=["q_proj", "up_proj", "down_proj"])
    gs.ablate_(ablated, masked)
    with torch.no_grad(), gs.applied(model, gs.zero(masked)):
        torch.testing.assert_close(model(**fed).logits, ablated(**fed).logits, rtol=1e-12, atol=1e-12)


def test_a_mask_on_what_does_not_train_is_an_error() -> None:
    model = adapted("llama", target_modules=["q_proj"])
    anatomy = gs.dissect(model)
    for region in (anatomy.neurons[:, :4], gs.region(model, "*.q_proj.base_layer.weight")):
        with pytest.raises(SelectionError, match=r"no entry that trains.*adapter"), gs.applied(model, gs.mask(region)):
            pass
        with pytest.raises(SelectionError, match="no entry that trains"):
            gs.attach(gs.Method([gs.Pass("p", under=[gs.mask(region)])]), model)
    ranks = anatomy.latents[:, :2]
    assert ranks.numel() == 3 * 2 * (42 + 60)
    fed = dummy_inputs(model)
    with gs.applied(model, gs.mask(ranks)):
        model(**fed, labels=fed["input_ids"]).loss.backward()
    grad = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight").grad
    assert (grad[:2] == 0).all() and (grad[2:] != 0).any()
