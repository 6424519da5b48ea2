"""One training step under SGTM and under freeze, against the stock step of the same model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import gradsurgery as gs

LAYERS, WIDTH, HEADS, VOCABULARY, BATCH, TOKENS = 8, 384, 8, 8192, 4, 256
FORGET_NEURONS = 64


def build(device: str) -> tuple[GPTNeoForCausalLM, torch.optim.Optimizer, torch.Tensor]:
    """GPT-Neo, 8 layers, width 384, vocabulary 8,192; AdamW; a batch of 4 x 256 tokens."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], LAYERS // 2]],
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    return model, optimizer, torch.randint(0, VOCABULARY, (BATCH, TOKENS), device=device)


def candidates(device: str) -> tuple[Callable[[], None], dict[str, Callable[[], None]]]:
    """The stock step, and the steps to compare with it; each on a model of its own, attached once."""
    labels = {
        "forget batch": ([1, 1, 1, 1], [0, 0, 0, 0]),
        "retain batch": ([0, 0, 0, 0], [1, 1, 1, 1]),
        "mixed batch": ([1, 1, 0, 0], [0, 0, 1, 1]),
        "alternating rows": ([1, 0, 1, 0], [0, 1, 0, 1]),
    }
    out: dict[str, Callable[[], None]] = {
        "stock against itself": stock_step(device),
        "stock without a key-value cache": stock_step(device, use_cache=False),
        "surgery without transforms": surgical_step(device, lambda anatomy: gs.methods.plain(), {}),
    }
    for where in ("last units", "scattered units"):
        for name, (is_forget, is_retain) in labels.items():
            columns = {"forget": torch.tensor(is_forget).bool(), "retain": torch.tensor(is_retain).bool()}
            out[f"sgtm, {name}, {where}"] = surgical_step(device, partial(sgtm, where=where), columns)
    for share in (0.05, 0.95):
        out[f"freeze {share:.0%} of the model"] = surgical_step(device, partial(frozen, share=share), {})
    return stock_step(device), out


def stock_step(device: str, **options: bool) -> Callable[[], None]:
    """What a user writes; ``options`` go to the model's forward."""
    model, optimizer, ids = build(device)

    def step() -> None:
        model(input_ids=ids, labels=ids, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def surgical_step(
    device: str, make: Callable[[gs.Anatomy], gs.Method], columns: dict[str, torch.Tensor]
) -> Callable[[], None]:
    model, optimizer, ids = build(device)
    surgery = gs.attach(make(gs.dissect(model)), model, optimizer)
    batch = {"input_ids": ids, "labels": ids, **columns}

    def step() -> None:
        surgery.backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sgtm(anatomy: gs.Anatomy, where: str) -> gs.Method:
    """One head and 64 neurons a layer for the forget data: the last ones, or some in between."""
    chosen = torch.randperm(4 * WIDTH, generator=torch.Generator().manual_seed(0))[:FORGET_NEURONS].sort().values
    if where == "last units":
        return gs.methods.sgtm(anatomy, anatomy.heads[:, -1:] | anatomy.neurons[:, -FORGET_NEURONS:])
    return gs.methods.sgtm(anatomy, anatomy.heads[:, [3]] | anatomy.neurons[:, chosen])


def frozen(anatomy: gs.Anatomy, share: float) -> gs.Method:
    """Freeze about this share of the model: neurons up to a half, all but neurons above."""
    small = min(share, 1 - share)
    neurons = anatomy.neurons[:, -round(small * anatomy.space.numel() / (LAYERS * (2 * WIDTH + 1))) :]
    region = neurons if share < 0.5 else ~neurons
    return gs.Method([gs.Pass("plain")], update=[gs.freeze(region)])
