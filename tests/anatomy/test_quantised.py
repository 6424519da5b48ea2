"""Quantised models: the units of the architecture, what of them may be permuted, and no write into packed weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from gradsurgery.anatomy.discovery.inputs import dummy_inputs
from gradsurgery.anatomy.groups import Footprint, UnitGroup
from gradsurgery.anatomy.quantised import Quantised, permutable
from gradsurgery.errors import AnatomyError, PlanError, SelectionError
from tests.anatomy.wrapped import base_units

SIZES = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
DOWN = "model.layers.0.mlp.down_proj.weight"


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao(name: str, **options: Any) -> Any:
    ao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    if (width := options.pop("width", None)) is not None:
        options["granularity"] = ao.PerGroup(width)
    return TorchAoConfig(getattr(ao, name)(**options))


#: scheme, entries that share a scale, the config
SCHEMES: dict[str, tuple[str, tuple[int, int], Callable[[], Any]]] = {
    "8 bit": ("int8", (1, 192), lambda: bitsandbytes(load_in_8bit=True)),
    "nf4": ("nf4", (1, 64), lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "int8": ("Int8Tensor", (1, 192), lambda: torchao("Int8WeightOnlyConfig")),
    "int8 groups": (
        "IntxUnpackedToInt8Tensor",
        (1, 32),
        lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int8, width=32),
    ),
    "float8": ("Float8Tensor", (1, 192), lambda: torchao("Float8WeightOnlyConfig")),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING["llama"](**SIZES))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def load(folder: Path, scheme: str) -> Any:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = SCHEMES[scheme][2]()
        return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def dequantised(parameter: Any) -> Tensor:
    if hasattr(parameter, "quant_state"):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    if hasattr(parameter, "SCB"):
        return parameter.CB * parameter.SCB[:, None] / 127
    return parameter.data.dequantize()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore")
def test_units_are_those_of_the_architecture(scheme: str, stock: tuple[Any, Path], tmp_path: Path) -> None:
    model, anatomy = load(stock[1], scheme), gs.dissect(stock[0])
    before = [(type(p), p.detach().clone()) for p in model.parameters()]
    found = gs.dissect(model)
    assert found == anatomy and found.fingerprint == anatomy.fingerprint
    assert [type(p) for p in model.parameters()] == [kind for kind, _ in before]
    name, block, _ = SCHEMES[scheme]
    assert found.quantised[DOWN] == Quantised(name, (128, 192), block)
    assert len(found.quantised) == 14 and f"quantised: 14 as {name}" in str(found).replace(" 12 as", " 14 as")
    found.save(tmp_path / "quantised.json")
    assert gs.Anatomy.load(tmp_path / "quantised.json").quantised == found.quantised
    anatomy.save(tmp_path / "stock.json")
    assert gs.Anatomy.load(tmp_path / "stock.json", model).quantised == found.quantised
    assert not anatomy.quantised


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_written_into_packed_weights(scheme: str, stock: tuple[Any, Path]) -> None:
    model, anatomy = load(stock[1], scheme), gs.dissect(stock[0])
    for act in (gs.ablate_, gs.prune_):
        with pytest.raises(PlanError, match=r"q?[a-z_]*\.weight is quantised .*before quantising.*dequantize"):
            act(model, anatomy.neurons[:, :8])  # type: ignore[operator]
    with (
        pytest.raises(SelectionError, match="no entry that trains"),
        gs.applied(model, gs.mask(anatomy.neurons[:, :8])),
    ):
        pass


@pytest.mark.parametrize("scheme", ["nf4", "int8", "8 bit"])
@pytest.mark.filterwarnings("ignore")
def test_activations_of_quantised_models_can_be_zeroed(scheme: str, stock: tuple[Any, Path]) -> None:
    model, anatomy = load(stock[1], scheme), gs.dissect(stock[0])
    fed = dummy_inputs(model)
    chosen = anatomy.neurons[:, :8]
    seen = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.arange(8), 0.0))
    with torch.no_grad():
        wanted = model(**fed).logits
        for layer in model.model.layers:
            layer.mlp.act_fn._forward_hooks.clear()
        with gs.applied(model, gs.zero(chosen)):
            seen.append(model(**fed).logits)
        assert torch.equal(seen[0], wanted) or float((seen[0] - wanted).abs().max()) < 1e-5
        assert not torch.equal(model(**fed).logits, wanted)


@pytest.mark.filterwarnings("ignore")
def test_what_may_be_permuted_survives_quantising_again(stock: tuple[Any, Path]) -> None:
    """4 bit: rows, columns of one block of 64, whole blocks; other columns lose their values."""
    functional = pytest.importorskip("bitsandbytes").functional
    model = load(stock[1], "nf4")
    anatomy = gs.dissect(model)
    heads, neurons = (next(g for g in anatomy.groups if g.kind == kind) for kind in ("head", "neuron"))
    assert anatomy.permutable(heads) == heads.exchange_classes == (0, 0, 1, 1)  # 64 columns each: whole blocks
    assert anatomy.permutable(neurons) == tuple(j // 64 for j in range(192))
    weights = dict(model.named_parameters())

    def loss(group: UnitGroup, one: int, other: int) -> float:
        worst = 0.0
        for (name, first), (_, second) in zip(group.units[one], group.units[other], strict=True):
            values = dequantised(weights[name])
            ((dim, here),), ((_, there),) = first.items(), second.items()
            moved = values.clone()
            for a, b in ((here, there), (there, here)):
                moved.index_copy_(dim, torch.tensor(a), values.index_select(dim, torch.tensor(b)))
            packed, state = functional.quantize_4bit(moved, blocksize=64, quant_type="nf4")
            worst = max(worst, float((functional.dequantize_4bit(packed, state) - moved).abs().max()))
        return worst

    assert loss(heads, 0, 1) == 0.0 and loss(neurons, 3, 60) == 0.0 and loss(neurons, 130, 190) == 0.0
    assert loss(neurons, 3, 70) > 1e-4


@pytest.mark.parametrize("width", [32, 192])
@pytest.mark.filterwarnings("ignore")
def test_columns_move_inside_a_group(width: int, stock: tuple[Any, Path]) -> None:
    model = load(stock[1], "int8 groups" if width == 32 else "int8")
    anatomy = gs.dissect(model)
    neurons = next(g for g in anatomy.groups if g.kind == "neuron")
    assert anatomy.permutable(neurons) == tuple(j // width for j in range(192))
    weight: Any = model.get_parameter(DOWN).data
    order = torch.arange(192)
    order[[3, 30]] = order[[30, 3]]
    values = weight.dequantize()[:, order]
    weight.qdata.copy_(weight.qdata[:, order])
    assert torch.equal(weight.dequantize(), values)


def test_finer_classes() -> None:
    index = np.arange(12).reshape(6, 2)
    group = UnitGroup("head", "a", 0, (Footprint("w", {1: index}),), (0,), (0, 0, 0, 0, 1, 1), True)
    assert permutable(group, {}) == (0, 0, 0, 0, 1, 1)
    assert permutable(group, {"w": Quantised("x", (3, 12), (1, 2))}) == (0, 0, 0, 0, 1, 1)
    assert permutable(group, {"w": Quantised("x", (3, 12), (1, 4))}) == (0, 0, 1, 1, 2, 2)
    assert permutable(group, {"w": Quantised("x", (3, 12), None)}) == (0, 1, 2, 3, 4, 5)
    assert "no part may be permuted" in str(Quantised("x", (3, 12), None))
    assert str(Quantised("x", (3, 12), (1, 4))) == (
        "x: may be permuted along dim 0 freely, dim 1 inside blocks of 4, or block by block"
    )


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_a_quantised_base(stock: tuple[Any, Path]) -> None:
    peft = pytest.importorskip("peft")
    model = load(stock[1], "nf4")
    model = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(model), peft.LoraConfig(r=4, target_modules="all-linear")
    )
    anatomy = gs.dissect(model)
    assert base_units(anatomy) == base_units(gs.dissect(stock[0]))
    assert sum(len(g) for g in anatomy.groups if g.kind == "latent") == 2 * 7 * 4
    assert len(anatomy.quantised) == 14
    fed, masked = dummy_inputs(model), anatomy.neurons[:, :8]
    with gs.applied(model, gs.mask(masked)):
        model(**fed, labels=fed["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads and all(not g[masked.of(n).mask()].any() for n, g in grads.items() if n in masked)
    with pytest.raises(PlanError, match="is quantised"):
        gs.ablate_(model, masked)


def test_formats_that_cannot_be_read_are_refused(stock: tuple[Any, Path]) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(stock[0].config)
    model.is_quantized, model.quantization_method = True, "gptq"
    model.model.layers[0].mlp.down_proj.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))
    with pytest.raises(AnatomyError, match=r"quantised \(gptq\).*before it is quantised"):
        gs.dissect(model)
