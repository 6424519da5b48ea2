"""Keys of 20% on the 64M GPT-Neo configuration: swaps against a plain copy of the bytes they touch, tiered steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import gradsurgery as gs
from gradsurgery.errors import KeyWarning

LAYERS, WIDTH, HEADS, VOCABULARY = 12, 512, 32, 50257
BATCH, TOKENS = 4, 256


def build(device: str) -> GPTNeoForCausalLM:
    """The 64M configuration of the tiered experiments: 12 layers, width 512, 32 heads, vocabulary 50,257, tied."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], LAYERS // 2]],
        max_position_embeddings=1024,
    )
    return GPTNeoForCausalLM(config).to(device).train()


def key_of(anatomy: gs.Anatomy, fraction: float = 0.2, of: str = "all") -> gs.PermutationKey:
    warnings.simplefilter("ignore", KeyWarning)  # heads move between global and local layers, as in the originals
    key: gs.PermutationKey = gs.PermutationKey.generate(anatomy, fraction, of=of, seed=0)
    return key


def swaps(device: str) -> tuple[Callable[[], None], dict[str, Callable[[], None]], str]:
    """Two plain copies of the bytes that the key touches, and what applying the key and taking it back costs."""
    model = build(device)
    anatomy = gs.dissect(model)
    key = key_of(anatomy)
    entries = key.region(anatomy).numel()
    source = torch.randn(entries, device=device)
    copy = torch.empty_like(source)

    def plain() -> None:
        copy.copy_(source)
        copy.copy_(source)

    with_gradients = build(device)
    for parameter in with_gradients.parameters():
        parameter.grad = torch.randn_like(parameter)
    half = key.subset(0.5, seed=0)
    runs = {
        "apply_, weights": toggle(key, model, anatomy),
        "apply_, weights and gradients": toggle(key, with_gradients, anatomy),
        "apply_, half of the swaps (half of the bytes)": toggle(half, model, anatomy),
    }
    for name in ("attn_heads", "mlp_cols"):
        part = gs.PermutationKey(**{name: getattr(key, name)})
        share = part.region(anatomy).numel() / entries
        runs[f"apply_, {name} alone ({share:.0%} of the bytes)"] = toggle(part, model, anatomy)
    fact = f"{len(key):,} swaps, {entries:,} entries, {entries * 4 / 1e6:.1f} MB"
    return plain, runs, fact


def toggle(key: gs.PermutationKey, model: GPTNeoForCausalLM, anatomy: gs.Anatomy) -> Callable[[], None]:
    """Apply the key and take it back."""

    def run() -> None:
        key.apply_(model, anatomy=anatomy)
        key.unapply_(model)

    return run


def steps(device: str) -> tuple[Callable[[], None], dict[str, Callable[[], None]]]:
    """The stock step, and steps under keys; each on a model of its own."""
    return step(device, no_method), {name: step(device, make) for name, make in METHODS.items()}


def no_method(key: gs.PermutationKey, anatomy: gs.Anatomy) -> None:
    """The stock step."""


def masked(key: gs.PermutationKey, anatomy: gs.Anatomy) -> gs.Method:
    """What the passes of a tiered step do to gradients, without the key."""
    keyed = key.region(anatomy)
    return gs.Method([gs.Pass("C1", under=[gs.mask(keyed), gs.scale(~keyed, 0.5)])])


def two_passes(key: gs.PermutationKey, anatomy: gs.Anatomy) -> gs.Method:
    return gs.Method([gs.Pass("one"), gs.Pass("two")])


def tiered(key: gs.PermutationKey, anatomy: gs.Anatomy) -> gs.Method:
    return gs.methods.tiered(key, anatomy)


def tiered_in_c2(key: gs.PermutationKey, anatomy: gs.Anatomy) -> gs.Method:
    return gs.methods.tiered(key, anatomy, step_in="C2")


METHODS: dict[str, Callable[[gs.PermutationKey, gs.Anatomy], gs.Method | None]] = {
    "stock against itself": no_method,
    "masks and scales in one pass": masked,
    "two plain passes": two_passes,
    "tiered": tiered,
    "tiered, stepping in C2": tiered_in_c2,
}


def step(device: str, make: Callable[[gs.PermutationKey, gs.Anatomy], gs.Method | None]) -> Callable[[], None]:
    model = build(device)
    anatomy = gs.dissect(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS), device=device, generator=torch.Generator(device).manual_seed(0))
    method = make(key_of(anatomy), anatomy)
    surgery = gs.attach(method, model, optimizer) if method is not None else None

    def run() -> None:
        if surgery is not None:
            surgery.backward({"input_ids": ids, "labels": ids})
        else:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
