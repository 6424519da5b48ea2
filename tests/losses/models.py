"""Tiny models of several layouts, and what the tests of references ask of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16, "resid_pdrop": 0.5},  # Conv1D, tied, dropout
    "llama": {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
IDS = torch.arange(14).view(2, 7)
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = True) -> Any:
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[kind](vocab_size=31, tie_word_embeddings=tied, **SIZES[kind])
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()


def inputs() -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}


def logits(model: nn.Module) -> Tensor:
    """Of a plain forward in eval mode."""
    training = model.training
    with torch.no_grad():
        out = model.eval()(**inputs()).logits
    model.train(training)
    return out


def disturb_(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
