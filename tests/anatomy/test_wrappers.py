"""The same anatomy whatever a model is wrapped in, and the model as it was before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.anatomy.discovery.inputs import dummy_inputs
from gradsurgery.errors import AnatomyError
from tests.anatomy.wrapped import assert_untouched, base_units, state_of
from tests.engines.test_ranks import launch
from tests.zoo.builder import ZOO, build


def half(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.to(dtype)


def frozen(model: nn.Module) -> nn.Module:
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


def dropping(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in ("attention_dropout", "dropout", "activation_dropout", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.4)
    return model.train()


def hooked(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.register_forward_hook(_fail)
        module.register_forward_pre_hook(_fail)
        module.register_full_backward_hook(_fail)
    return model


def _fail(*_: Any) -> None:
    raise AssertionError("a hook of the model ran")


def dispatched(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def checkpointed(model: Any) -> nn.Module:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


STATES = {
    "dropout": dropping,
    "bf16": lambda m: half(m, torch.bfloat16),
    "fp16": lambda m: half(m, torch.float16),
    "frozen": frozen,
    "without gradients": lambda m: m.requires_grad_(False),
    "hooks": hooked,
    "dispatched": dispatched,
    "checkpointing": checkpointed,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_states_of_a_model(name: str, state: str) -> None:
    anatomy = gs.dissect(build(name))
    model = STATES[state](build(name))
    before = state_of(model)
    assert gs.dissect(model) == anatomy
    assert_untouched(before, model)


def test_whatever_the_caller_is_in_the_middle_of() -> None:
    model = build("llama")
    anatomy = gs.dissect(model)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert gs.dissect(model) == anatomy
    with torch.inference_mode():
        assert gs.dissect(model) == anatomy
        assert gs.dissect(build("llama")) == anatomy
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert gs.dissect(model) == anatomy
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_offloaded_weights() -> None:
    """They are on the meta device between forwards; the model is built anew from its config."""
    accelerate = pytest.importorskip("accelerate")
    model = build("llama").requires_grad_(False)
    anatomy, fed = gs.dissect(model), dummy_inputs(model)
    wanted = model(**fed).logits
    accelerate.cpu_offload(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert gs.dissect(model) == anatomy
    assert torch.equal(model(**fed).logits, wanted)


@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "layer by layer"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_models(way: str) -> None:
    """Seen through; nothing is compiled on the way, and nothing anew afterwards."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    plain: Any = build("llama").requires_grad_(False)
    fed, anatomy = dummy_inputs(plain), gs.dissect(plain)
    wanted = plain(**fed).logits
    model: Any = copy.deepcopy(plain)
    if way == "torch.compile":
        model = torch.compile(model, backend="eager")
    elif way == "model.compile":
        model.compile(backend="eager")
    else:
        for k, layer in enumerate(model.model.layers):
            model.model.layers[k] = torch.compile(layer, backend="eager")
    compiled = model(**fed).logits
    counters.clear()
    found = gs.dissect(model)
    assert counters["stats"]["unique_graphs"] == 0
    assert found == anatomy if way != "layer by layer" else base_units(found) == base_units(anatomy)
    assert torch.equal(model(**fed).logits, compiled)
    assert counters["stats"]["unique_graphs"] == 0
    torch.testing.assert_close(compiled, wanted)
    torch._dynamo.reset()


def on_meta(name: str, **changes: Any) -> Any:
    import transformers

    auto, kind, fields = ZOO[name]
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(transformers.CONFIG_MAPPING[kind](**{**fields, **changes}))
    model.tie_weights()  # transformers 5.0 leaves that out on meta
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "deepseek_v3", "t5", "bert", "vit", "mamba2"])
def test_models_on_meta(name: str) -> None:
    model = on_meta(name)
    assert gs.dissect(model) == gs.dissect(build(name))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_untied_models_on_meta_are_refused() -> None:
    model = on_meta("gpt2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # as transformers 5.0 builds it
    with pytest.raises(AnatomyError, match=r"lm_head.*tie_weights"):
        gs.dissect(model)


def test_large_models_on_meta() -> None:
    wide = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 900}
    model = on_meta("llama", **wide, intermediate_size=1500)
    import transformers

    assert gs.dissect(model) == gs.dissect(transformers.AutoModelForCausalLM.from_config(model.config))


class Block(nn.Module):
    """A transformer block written by hand; ``twice`` puts the same MLP behind every block."""

    def __init__(self, width: int, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp or nn.Sequential(nn.Linear(width, 17), nn.GELU(), nn.Dropout(0.5), nn.Linear(17, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(mixed), 0.5, self.training)
        return x + self.mlp(self.other(x))


class Custom(nn.Module):
    """A transformer that Hugging Face knows nothing of."""

    def __init__(self, shared: bool = False, same: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 24)
        mlp = Block(24).mlp if shared else None
        first = Block(24, mlp)
        self.blocks = nn.ModuleList([first, first if same else Block(24, mlp)])
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 31, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = {"ids": torch.arange(22).reshape(2, 11) + 3}


@pytest.mark.parametrize("state", ["dropout", "bf16", "frozen", "hooks", "data parallel"])
def test_custom_models(state: str) -> None:
    anatomy = gs.dissect(Custom(), IDS)
    assert [(g.kind, g.layer, len(g)) for g in anatomy.groups] == [
        (kind, layer, count) for layer in (0, 1) for kind, count in (("head", 3), ("neuron", 17))
    ]
    model = STATES[state](Custom())
    before = state_of(model)
    assert gs.dissect(model, IDS) == anatomy
    assert_untouched(before, model)


def test_modules_that_are_used_twice() -> None:
    """Units of a shared module are there once; a whole block that runs twice is one block."""
    anatomy = gs.dissect(Custom(tied=True), IDS)
    assert anatomy.space.aliases == {"head.weight": "tokens.weight"} and len(anatomy.groups) == 4
    same = gs.dissect(Custom(same=True), IDS)
    assert [(g.kind, g.name) for g in same.groups] == [("head", "blocks.0"), ("neuron", "blocks.0.mlp")]
    shared = gs.dissect(Custom(shared=True), IDS)
    assert [len(g) for g in shared.groups if g.kind == "head"] == [3, 3]
    assert [(g.name, len(g)) for g in shared.groups if g.kind == "neuron"] == [("blocks.0.mlp", 17)]


def test_custom_models_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = Custom()
    with pytest.raises(AnatomyError, match=r"no Hugging Face config.*give the model weights"):
        gs.dissect(model, IDS)


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which needs ranks."""


def test_flat_parameters_are_refused() -> None:
    model = build("llama")
    model.model.layers[0].register_module("wrapped", FullyShardedDataParallel())  # type: ignore[union-attr, index, operator]
    with pytest.raises(AnatomyError, match=r"flat parameters.*fully_shard"):
        gs.dissect(model)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    """DDP and FSDP2, small models and large ones; an anatomy made before sharding fits afterwards."""
    found = launch("tests.anatomy.ranks", directory=tmp_path)
    assert all(found.values()), found
    assert len(found) == 12
