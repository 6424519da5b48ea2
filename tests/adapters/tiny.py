"""Tiny models, adapters with something in them, and batches with flags that the tests of adapters share."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.adapters import Adapter
from tests.zoo.builder import build

MODELS = ["llama", "gpt2", "gpt_neo", "mixtral"]
ROWS, TOKENS = 5, 7


@functools.cache
def _built(name: str) -> nn.Module:
    return build(name)


def model_of(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy, in eval mode: no dropout."""
    return copy.deepcopy(_built(name)).to(dtype)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `gs.adapters.add`."""
    rank = st.integers(1, 8).filter(lambda r: r != TOKENS)  # gs.mask asks which dimension of [batch, 7, 7] are tokens
    ranks = {"rank": draw(rank), "quarantine_rank": draw(rank), "seed": draw(st.integers(0, 9))}
    kind = draw(st.sampled_from(["lora", "svd", "reserved"]))
    if kind == "lora":
        return {**ranks, "alpha": draw(st.sampled_from([None, 3.0]))}
    if kind == "svd":
        ranks["quarantine_rank"] = min(ranks["quarantine_rank"], ranks["rank"])
        return {**ranks, "kind": "svd"}
    return {"kind": "svd", "rank": ranks["rank"] + 8, "quarantine_rank": ranks["quarantine_rank"], "reserved": True}


def stir(adapter: Any, size: float = 0.3, seed: int = 0) -> Any:
    """Put noise into both parts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in ("kept", "quarantine"):
            for p in adapter.parameters_of(part).values():
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return adapter


def adapted(name: str, dtype: torch.dtype = torch.float32, modules: Any = "all-linear", **given: Any) -> Adapter:
    """A fresh model with an adapter that does something."""
    return stir(gs.adapters.add(model_of(name, dtype), modules, **(given or {"rank": 4})))


def batch(rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """Rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (rows, TOKENS), generator=generator)
    lengths = torch.randint(3, TOKENS + 1, (rows,), generator=generator)
    mask = (torch.arange(TOKENS)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows_of(given: dict[str, Tensor], keep: Any) -> dict[str, Tensor]:
    return {name: value[keep] for name, value in given.items()}


def logits(model: nn.Module, given: dict[str, Tensor] | None = None) -> Tensor:
    given = batch() if given is None else given
    with torch.no_grad():
        return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits


def grads(adapter: Any, part: str) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in adapter.parameters_of(part).items()}
    return {
        name: torch.zeros_like(p) if (g := found[name]) is None else g.clone()
        for name, p in adapter.parameters_of(part).items()
    }


def clear(adapter: Any) -> None:
    for p in adapter.host.parameters():
        p.grad = None


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def size(a: dict[str, Tensor]) -> float:
    return max(float(x.double().abs().max()) for x in a.values())


def flags(rows: int = ROWS, tokens: bool = True) -> st.SearchStrategy[Tensor]:
    """``[batch]`` or ``[batch, token]``; all and none are among them."""
    some = st.lists(st.booleans(), min_size=rows, max_size=rows).map(torch.tensor)
    each = st.lists(st.booleans(), min_size=rows * TOKENS, max_size=rows * TOKENS)
    by_token = each.map(lambda v: torch.tensor(v).reshape(rows, TOKENS))
    return st.one_of(some, by_token) if tokens else some
