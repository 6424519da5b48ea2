"""How long it takes to dissect a model of Llama-70B's size without its weights, and with how much memory."""

from __future__ import annotations

import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradsurgery as gs


def dissect_70b() -> dict[str, float]:
    """Seconds of ``gs.dissect`` on a 70B configuration on ``meta``, and the peak of the process in GiB."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    start = time.perf_counter()
    anatomy = gs.dissect(model)
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": taken, "peak_gib": peak, "units": float(sum(map(len, anatomy.groups)))}
