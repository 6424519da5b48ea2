"""Names that the examples in docstrings and in the README may use, and settings of all tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(heads: int = 4, kv: int = 2) -> LlamaForCausalLM:
    """Two layers, four heads on two KV heads, 32 neurons."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest) -> None:
    """``gs``, ``torch``, a tiny ``model`` with its ``anatomy`` and a ``batch`` for doctests."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import gradsurgery as gs

    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 8))
    names: dict[str, Any] = {"gs": gs, "torch": torch, "model": model, "anatomy": gs.dissect(model)}
    request.getfixturevalue("doctest_namespace").update(names, batch={"input_ids": ids, "labels": ids})
