"""Pruned models: smaller, the function of the ablated one, and stock checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError
from gradsurgery.transforms.graft import Graft
from gradsurgery.transforms.resize import built
from tests.transforms.cases import FAST, SLOW, Case, case
from tests.zoo.builder import ZOO, randomised
from tests.zoo.older import older_than

NEURONS = [name for name in [*FAST, *SLOW] if name not in ("bloom", "falcon_alibi", "mamba2", "deepseek_v3")]
HEADS = ["llama", "llama_mha", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "gpt_oss", "deepseek_v3"]
#: Head sizes are the hidden size over the number of heads, or norms and biases couple heads.
FIXED_HEADS = ["gpt_neo", "gpt2", "gpt_neox", "bloom", "falcon_new", "opt", "bert", "bart", "t5", "olmo2", "mamba2"]
(FIXED_HEADS if older_than("5.9") else HEADS).append("vit")  # whose config then got a head size


def state(model: Any) -> list[object]:
    out: list[object] = [model.config.to_dict(), {n: (id(p), p.shape) for n, p in model.named_parameters()}]
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
        out.append((path, id(module), plain))
    return out


def check_pruned(c: Case, chosen: gs.Units, tmp_path: Path) -> Any:
    pruned, ablated = c.copy().train(), c.copy()
    gs.ablate_(ablated, chosen)
    first = next(pruned.parameters()).requires_grad_(False)
    gs.prune_(pruned, chosen)
    assert pruned.training and not first.requires_grad and all(p.grad is None for p in pruned.parameters())
    assert {p.dtype for p in pruned.parameters()} == {torch.float64}
    size = sum(p.numel() for p in c.model.parameters())
    assert size - sum(p.numel() for p in pruned.parameters()) == gs.Units(c.anatomy, chosen.chosen).numel()
    pruned.eval()
    pruned.save_pretrained(tmp_path)
    loaded = getattr(transformers, ZOO[c.name][0]).from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float64
    )
    loaded.config._experts_implementation = "eager"
    with torch.no_grad():
        wanted = c.outputs(ablated)
        torch.testing.assert_close(c.outputs(pruned), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(c.outputs(loaded), wanted, rtol=1e-5, atol=1e-5)
    again = gs.dissect(pruned)
    assert [len(g) for g in again.groups if g.kind == "neuron"] == [
        len(g) - chosen.chosen.get(k, 0).bit_count() for k, g in enumerate(c.anatomy.groups) if g.kind == "neuron"
    ]
    return pruned


@pytest.mark.parametrize("name", NEURONS)
def test_neurons(name: str, tmp_path: Path) -> None:
    c = case(name)
    if name == "bart":  # two widths, two attributes
        chosen = c.anatomy.neurons.named("model.encoder*")[:, -5:]
    else:
        chosen = c.anatomy.neurons[:, [0, 3, 4, -1]]
    check_pruned(c, chosen, tmp_path)


@pytest.mark.parametrize("name", HEADS)
def test_kv_groups(name: str, tmp_path: Path) -> None:
    c = case(name)
    check_pruned(c, c.anatomy.kv_groups[:, 1:], tmp_path)


def test_heads_and_neurons_together(tmp_path: Path) -> None:
    c = case("mixtral")
    pruned = check_pruned(c, c.anatomy.kv_groups[:, :1] | c.anatomy.neurons[:, 2:9], tmp_path)
    config = pruned.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 6)


def test_other_experts_may_lose_other_neurons(tmp_path: Path) -> None:
    c = case("gpt_oss")
    out = None
    for k, group in enumerate(g for g in c.anatomy.groups if g.kind == "neuron"):
        part = c.anatomy.neurons.named(group.name)[:, [k % 13, (k + 5) % 13]]
        out = part if out is None else out | part
    assert out is not None
    check_pruned(c, out, tmp_path)


def test_one_head_of_every_group(tmp_path: Path) -> None:
    """A query head of each group may go alone: the shared keys and values stay."""
    c = case("qwen3")
    pruned = check_pruned(c, c.anatomy.heads[:, [1, 2, 5]], tmp_path)
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads) == (3, 3)


@pytest.mark.parametrize("name", FIXED_HEADS)
def test_what_the_config_cannot_say(name: str) -> None:
    c = case(name)
    model = c.copy()
    before = state(model)
    with pytest.raises(PlanError, match="ablate_"):
        gs.prune_(model, c.anatomy.heads[:, :1])
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(c.outputs(model), c.outputs())


@pytest.mark.parametrize(
    "select",
    [
        "neurons[0, -5:]",
        "neurons[:2, :3] | neurons[2, :4]",
        "kv_groups[0, :1]",
        "heads[:, :1]",
        "experts[:, :1]",
        "kv_groups",
    ],
)
def test_uneven_or_open_removal(select: str) -> None:
    c = case("mixtral")
    model = c.copy()
    before = state(model)
    with pytest.raises(PlanError, match="ablate_"):
        gs.prune_(model, c.anatomy.select(select))  # type: ignore[arg-type]
    assert state(model) == before


def test_shapes_that_fit_are_not_enough() -> None:
    """9 heads in 3 groups, of which 3, 2 and 1 stay: the class would share keys 2, 2, 2."""
    fields = {"hidden_size": 36, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 9}
    config = transformers.LlamaConfig(vocab_size=31, num_key_value_heads=3, head_dim=4, **fields)
    model: Any = randomised(transformers.LlamaForCausalLM(config))
    before, anatomy = state(model), gs.dissect(model)
    with pytest.raises(PlanError, match="outputs differ"):
        gs.prune_(model, anatomy.heads[:, [3, 6, 7]])
    assert state(model) == before
    gs.prune_(model, anatomy.heads[:, [2, 3, 7]])
    assert model.config.num_attention_heads == 6


def test_buffers_are_the_class_s_own() -> None:
    """What a config change would do to rotary tables shows, though no shape does."""
    model: Any = case("llama").model
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 123.0}
    old, new = built(model, model.config, buffers=True), built(model, config, buffers=True)
    assert all(p.is_meta for p in new.parameters()) and not any(b.is_meta for b in new.buffers())
    assert "inv_freq" in Graft(model, old, new).obstacle() and not Graft(model, old, old).obstacle()


def test_refusals() -> None:
    c, other = case("llama"), case("gpt2")
    with pytest.raises(SelectionError, match="units_within"):
        gs.prune_(c.model, ~c.anatomy.neurons[:, :1])  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="another model"):
        gs.prune_(other.model, c.anatomy.neurons[:, :1])
    with torch.device("meta"):
        hollow = type(c.model)(copy.deepcopy(c.model.config))
    with pytest.raises(PlanError, match="meta"):
        gs.prune_(hollow, gs.dissect(hollow).neurons[:, :1])


def test_dtype_and_ties_are_kept() -> None:
    c = case("gpt2", torch.bfloat16)
    model = c.copy()
    table = model.get_input_embeddings().weight
    gs.prune_(model, c.anatomy.neurons[:, -8:])
    assert model.lm_head.weight is model.get_input_embeddings().weight is table
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.n_inner == 44
    model(**c.batch, labels=c.batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
