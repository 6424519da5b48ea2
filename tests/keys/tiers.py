"""Tiered training written out by hand on tiny models: what the methods are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.keys.cases import Slot, slots_of, slow_
from tests.surgery.tiny import anatomy, batch, build, cut

Grads = dict[str, Tensor]
Window = Sequence[dict[str, Tensor]]


def key_of(kind: str, seed: int = 0) -> gs.PermutationKey:
    """One swap of heads, and neurons of both layers."""
    fraction = {"gpt_neo": 0.5, "llama": 0.56}[kind]
    return gs.PermutationKey.generate(anatomy(kind), fraction=fraction, attention_ratio=0.5, seed=seed)


def keys_of(kind: str, count: int, seed: int = 0) -> list[gs.PermutationKey]:
    return gs.PermutationKey.generate(anatomy(kind), fraction=0.1, attention_ratio=0.0, count=count, seed=seed)


@functools.cache
def slots_in(kind: str) -> tuple[Slot, ...]:
    return slots_of(anatomy(kind), build(kind))


def double(kind: str, **more: Any) -> Any:
    return build(kind, **more).double()


def windows(steps: int = 3, micro: int = 1, rows: int = 4) -> list[Window]:
    """A window of micro-batches a step."""
    out: list[Window] = []
    for k in range(steps):
        whole = batch(rows, seed=k)
        out.append([cut(whole, m * rows // micro, (m + 1) * rows // micro) for m in range(micro)])
    return out


def loss_of(model: Any, given: dict[str, Tensor], tokens: Any = None) -> Tensor:
    """Cross entropy of the next token, summed over the batch and divided by ``tokens`` (by default its own)."""
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits
    targets = given["labels"][:, 1:].flatten()
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum() if tokens is None else tokens)


def tokens_of(window: Window) -> Tensor:
    return sum((given["labels"][:, 1:] != -100).sum() for given in window)  # type: ignore[return-value]


@contextmanager
def turned(model: nn.Module, kind: str, keys: Sequence[gs.PermutationKey]) -> Iterator[None]:
    """Weights under some keys, moved the slow way; gradients stay where they are."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for key in keys:
            slow_(weights, slots_in(kind), key)
    try:
        yield
    finally:
        with torch.no_grad():
            for key in keys:
                slow_(weights, slots_in(kind), key)


def tier_gradient(
    model: nn.Module, kind: str, keys: Sequence[gs.PermutationKey], loss: Callable[[Any], Tensor]
) -> Grads:
    """The gradient of one tier alone, in the places of C1."""
    with turned(model, kind, keys):
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(loss(model), list(named.values()), allow_unused=True)
        out = {
            n: torch.zeros_like(p) if g is None else g.clone() for (n, p), g in zip(named.items(), grads, strict=True)
        }
    for key in keys:
        slow_(out, slots_in(kind), key)
    return out


def mask_of(region: gs.Region, name: str) -> Tensor:
    return region.of(name).mask()


def combine(parts: Sequence[tuple[Grads, Sequence[tuple[gs.Region, float]]]]) -> Grads:
    """The sum of some gradients, each times factors of regions; entries in none of its regions count nothing."""
    out = {n: torch.zeros_like(g) for n, g in parts[0][0].items()}
    for grads, factors in parts:
        for name, grad in grads.items():
            for region, factor in factors:
                out[name] += torch.where(mask_of(region, name), grad * factor, torch.zeros_like(grad))
    return out


def originals(
    model: nn.Module, kind: str, key: gs.PermutationKey, optimizer: torch.optim.Optimizer, steps: Sequence[Window]
) -> None:
    """The originals' training loop: C1, keyed gradients to zero, swap, C2, public gradients halved, step, swap back."""
    keyed = key.region(anatomy(kind))
    for window in steps:
        tokens = tokens_of(window)
        for given in window:
            loss_of(model, given, tokens).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                p.grad[mask_of(keyed, name)] = 0.0
        with turned(model, kind, [key]):
            for given in window:
                loss_of(model, given, tokens).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    p.grad[~mask_of(keyed, name)] *= 0.5
            optimizer.step()
            optimizer.zero_grad()


def trained(
    method: gs.Method, model: Any, optimizer: torch.optim.Optimizer, steps: Sequence[Any], host: Any = None
) -> list[dict[str, Tensor]]:
    """Train by a method; the losses of every step."""
    out = []
    with gs.attach(method, host if host is not None else model, optimizer) as surgery:
        for window in steps:
            items = surgery.count_items(window)
            for given in window:
                losses = surgery.backward(given, num_items=items)
            out.append(losses)
            optimizer.step()
            optimizer.zero_grad()
    return out
