"""Tiny models, batches and methods that the tests of surgeries and engines share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import gradsurgery as gs

VOCABULARY, TOKENS = 61, 7

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "gpt_neo": {
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 3,
        "intermediate_size": 20,
        "window_size": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 32,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    },
}


def build(kind: str = "llama", seed: int = 0, **more: Any) -> Any:
    """A tiny model in train mode, every parameter away from its default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fields = {
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **CONFIGS[kind],
            **more,
        }
        model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


@functools.cache
def anatomy(kind: str = "llama", **more: Any) -> gs.Anatomy:
    return gs.dissect(build(kind, **more))


def forget_of(kind: str = "llama", **more: Any) -> gs.Units:
    found = anatomy(kind, **more)
    heads = found.kv_groups if kind == "llama" else found.heads
    return heads[:, -1:] | found.neurons[:, -6:]


def sgtm(kind: str = "llama", strategy: Any = "mask", stages: bool = True, **more: Any) -> gs.Method:
    """SGTM with everything the plan can hold: protected embeddings and norms, clip, freeze."""
    found, forget = anatomy(kind, **more), forget_of(kind, **more)
    method = gs.methods.sgtm(found, forget, strategy=strategy, embeddings="retain", norms="retain")
    if not stages:
        return method
    frozen = found.neurons[0, :4] | gs.region(build(kind, **more), "*norm.weight" if kind == "llama" else "*ln_f*")
    return gs.Method(method.passes, gradient=[gs.clip(0.7)], update=[gs.freeze(frozen)])


def batch(rows: int = 6, seed: int = 0, padded: bool = True) -> dict[str, Tensor]:
    """Rows of different lengths: forget, retain, and neither, in turn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=generator)
    lengths = torch.randint(3, TOKENS + 1, (rows,), generator=generator) if padded else torch.full((rows,), TOKENS)
    mask = (torch.arange(TOKENS)[None] < lengths[:, None]).long()
    kind = torch.arange(rows) % 3
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "forget": kind == 0,
        "retain": kind == 1,
    }


def cut(whole: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: value[start:stop] for name, value in whole.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of an entry."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def checkpointing() -> str:
    """The Trainer's argument for activation checkpointing, by the name that this release has."""
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
