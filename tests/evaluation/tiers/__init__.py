"""Tiny models with a key, and what the tests of tiers ask of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

import gradsurgery as gs

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_inner": 40, "n_positions": 64},
    "llama": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "mixtral": {
        "hidden_size": 24,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
}
IDS = torch.randint(0, 61, (6, 12), generator=torch.Generator().manual_seed(0))
TEXT = {"one": IDS[:3], "other": IDS[3:]}


@cache
def dissected(kind: str) -> tuple[nn.Module, gs.Anatomy]:
    """One model and its anatomy a kind; tests leave it as it was, or take `fresh`."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](vocab_size=61, bos_token_id=0, eos_token_id=0, **SIZES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # away from the symmetry of an initialisation: every tier computes something else
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model, gs.dissect(model)


def keyed(kind: str = "gpt2", **options: Any) -> tuple[nn.Module, gs.Anatomy, gs.PermutationKey]:
    model, anatomy = dissected(kind)
    options = {"fraction": 0.4, "attention_ratio": 0.5, "seed": 1, **options}
    return model, anatomy, gs.PermutationKey.generate(anatomy, **options)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], model: nn.Module) -> bool:
    now = model.state_dict()  # raises where a key is applied
    return before.keys() == now.keys() and all(torch.equal(value, now[name]) for name, value in before.items())
