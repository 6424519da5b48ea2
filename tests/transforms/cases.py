"""Tiny models with their anatomy, and draws of units, regions and flags for them."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.anatomy.discovery.inputs import dummy_inputs
from tests.zoo.builder import build

BATCH, LENGTH = 4, 7  #: no other size of the tiny models
FAST = ["gpt_neo", "gpt2", "llama", "qwen3", "phi3", "gpt_neox", "mixtral", "gpt_oss", "olmo2", "t5", "bert", "vit"]
FAST += ["gemma3_text", "bloom", "falcon_old", "falcon_new", "opt", "deepseek_v3", "mamba2"]
SLOW = ["llama_mha", "qwen2", "gemma3_mqa", "falcon_alibi", "mamba", "bart"]


@dataclass
class Case:
    """A tiny model in float64 and eval mode, its anatomy, and one batch.

    The loss of an example is a fixed random functional of its outputs, and a batch's loss is their sum, so that
    gradients of batches are sums of gradients of examples.
    """

    name: str
    model: Any
    anatomy: gs.Anatomy
    batch: dict[str, Any]

    @property
    def has_tokens(self) -> bool:
        return "input_ids" in self.batch

    def example(self, i: int) -> dict[str, Any]:
        return self.rows(slice(i, i + 1))

    def rows(self, rows: slice) -> dict[str, Any]:
        return {name: value[rows] if isinstance(value, Tensor) else value for name, value in self.batch.items()}

    def outputs(self, model: nn.Module | None = None, batch: dict[str, Any] | None = None) -> Tensor:
        out = (self.model if model is None else model)(**(self.batch if batch is None else batch))
        return out["logits"]

    def loss(self, model: nn.Module | None = None, batch: dict[str, Any] | None = None, first: int = 0) -> Tensor:
        """Sum over the examples; ``first`` is the number of the batch's first example."""
        logits = self.outputs(model, batch)
        functional = torch.randn(
            (BATCH, *logits.shape[1:]), generator=torch.Generator().manual_seed(11), dtype=torch.float64
        )
        weights = functional[first : first + logits.shape[0]].to(logits.dtype)
        return (torch.tanh(logits) * weights).sum()

    def copy(self) -> Any:
        return copy.deepcopy(self.model)


@functools.cache
def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    model = build(name)
    anatomy = gs.dissect(model)
    model = model.to(dtype)
    batch = dummy_inputs(model, batch=BATCH, length=LENGTH, seed=3)
    batch = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    return Case(name, model, anatomy, batch)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by canonical name (zeros where none arrives), without touching ``.grad``."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def assert_close(
    found: dict[str, Tensor], wanted: dict[str, Tensor], scale: dict[str, Tensor], tolerance: float = 2e-6
) -> None:
    """Equal to the rounding of the float32 parts that some architectures keep in a float64 model (norms, attention)."""
    assert found.keys() == wanted.keys()
    size = max(float(g.abs().max()) for g in scale.values())
    for name, gradient in wanted.items():
        limit = tolerance * max(float(scale[name].abs().max()), 1e-3 * size)
        gap = float((found[name] - gradient).abs().max())
        assert gap <= limit, f"{name} is off by {gap:.2e} of {float(scale[name].abs().max()):.2e}"


@st.composite
def units(
    draw: st.DrawFn, case: Case, kinds: tuple[str, ...] = ("heads", "kv_groups", "neurons", "experts")
) -> gs.Units:
    """Units of one or two kinds: contiguous or scattered, in some or all layers."""
    have = [kind for kind in kinds if getattr(case.anatomy, kind).chosen]
    out = None
    for kind in draw(st.lists(st.sampled_from(have), min_size=1, max_size=2, unique=True)):
        chosen = getattr(case.anatomy, kind)
        layers = sorted({case.anatomy.groups[g].layer for g in chosen.chosen})
        layer = draw(st.one_of(st.just(slice(None)), st.sampled_from(layers)))
        smallest = min(len(case.anatomy.groups[g]) for g in chosen.chosen)
        if kind == "kv_groups":
            parents = [case.anatomy.groups[g] for g in chosen.chosen]
            smallest = min(len(case.anatomy.parent_of(p) if p.parent else p) for p in parents)
        scattered = st.lists(st.integers(-smallest, smallest - 1), min_size=1, max_size=5)
        ends = st.integers(1, max(smallest // 2, 1)).flatmap(lambda n: st.sampled_from([slice(-n, None), slice(0, n)]))
        part = chosen[layer, draw(st.one_of(ends, scattered))]
        out = part if out is None else out | part
    assert out is not None
    return out


@st.composite
def regions(draw: st.DrawFn, case: Case) -> gs.Region:
    """Units, their rest, complements, and whole structural parameters: embeddings, norms, biases."""
    chosen = draw(units(case))
    form = draw(st.sampled_from(["units", "rest", "complement", "structure"]))
    shared: gs.Region = case.anatomy.structure("shared relative position bias")  # tells no examples apart; own test
    if form == "units":
        return chosen - shared if shared else chosen
    if form == "rest":
        other = case.anatomy.rest(chosen)
        return (other or chosen) - shared if shared else other or chosen
    if form == "complement":
        return ~chosen - shared
    found = case.anatomy.structure("embedding", "norm")
    return found | chosen if draw(st.booleans()) else found


def flags(case: Case, tokens: bool = True) -> st.SearchStrategy[Tensor | None]:
    """``None``, ``[batch]`` or ``[batch, token]``."""
    bools = lambda n: st.lists(st.booleans(), min_size=n, max_size=n)  # noqa: E731
    by_example = bools(BATCH).map(torch.tensor)
    by_token = bools(BATCH * LENGTH).map(lambda v: torch.tensor(v).reshape(BATCH, LENGTH))
    choices: list[st.SearchStrategy[Tensor | None]] = [st.none(), by_example]
    if tokens and case.has_tokens:
        choices.append(by_token)
    return st.one_of(choices)
