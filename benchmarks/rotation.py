"""Finetuning in rotated coordinates against plain finetuning; what the bases cost to make."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.estimators.activation_basis import collect
from gradsurgery.estimators.basis import Basis, Site
from gradsurgery.estimators.collect import Collector, Rows
from gradsurgery.estimators.covariance import eigenbasis
from gradsurgery.estimators.data import DataDigest
from gradsurgery.estimators.targets import targets_of

WIDTH, NEURONS, TOKENS = 576, 1536, 512
LAYERS_OF_135M = 30


def build(device: str) -> LlamaForCausalLM:
    """Layers and vocabulary of SmolLM2-135M; on a CPU a tenth of both, which keeps their proportion."""
    layers, words = (LAYERS_OF_135M, 49152) if device == "cuda" else (LAYERS_OF_135M // 10, 4915)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config).to(device).train()


def drawn_basis(model: LlamaForCausalLM, dtype: torch.dtype, share: float) -> Basis:
    """Orthonormal bases drawn at random, shared by q, k and v and by gate and up, as activations' are."""
    sites: dict[str, Site] = {}
    vectors: dict[str, Tensor | None] = {}
    leaders = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for target in targets_of(model, "all-linear", "benchmark"):
        own = target.name.split(".")[-2]
        key = target.name.replace(own, leaders.get(own, own))
        assert target.layout is not None
        sites[target.name] = Site(target.layout, key)
        if key not in vectors:
            width = model.get_parameter(key).shape[1]
            square = torch.linalg.qr(torch.randn(width, width)).Q[:, : round(share * width)]
            vectors[key] = square.to(model.device, dtype).contiguous()
    return Basis(ParameterSpace.of(model), "input", sites, vectors)


@dataclass(frozen=True)
class Candidate:
    """A way to finetune.

    Attributes:
        tokens: A step's, in rows of 512.
        kind: ``"stock"``, ``"surgery"`` (no transforms), ``"entry"``, ``"column"``, ``"plain"`` (entries of the weights
            themselves) or ``"reparametrised"``.
        kept: Share of the coordinates that are frozen; masks are drawn at random, so every column has some.
        dtype: Of the basis.
        gradient: Project the gradient too.
    """

    tokens: int
    kind: str
    kept: float = 0.1
    dtype: torch.dtype = torch.float32
    gradient: bool = False


def _candidates(tokens: int) -> dict[str, Candidate]:
    half = torch.bfloat16
    return {
        "stock against itself": Candidate(tokens, "stock"),
        "surgery without transforms": Candidate(tokens, "surgery"),
        "entry mask 10%, dense fp32 basis": Candidate(tokens, "entry"),
        "entry mask 10%, dense bf16 basis": Candidate(tokens, "entry", dtype=half),
        "entry mask 10%, dense bf16 basis, and the gradient": Candidate(tokens, "entry", dtype=half, gradient=True),
        "entry mask 1%, dense bf16 basis": Candidate(tokens, "entry", 0.01, half),
        "column mask 10%, factored fp32 basis": Candidate(tokens, "column"),
        "column mask 10%, factored bf16 basis": Candidate(tokens, "column", dtype=half),
        "column mask 10%, factored bf16, and the gradient": Candidate(tokens, "column", dtype=half, gradient=True),
        "column mask 50%, factored bf16 basis": Candidate(tokens, "column", 0.5, half),
        "entries of the weights, 10%": Candidate(tokens, "plain"),
        "reparametrised, dense fp32 basis": Candidate(tokens, "reparametrised"),
    }


SIZES = (1024, 2048, 4096, 8192)
CURVE = ("stock against itself", "entry mask 10%, dense fp32 basis", "column mask 10%, factored bf16 basis")
METHODS = {
    f"{name}, {tokens} tokens": c
    for tokens in SIZES
    for name, c in _candidates(tokens).items()
    if tokens in (1024, 4096) or name in CURVE
}


def step(device: str, candidate: Candidate) -> Callable[[], None]:
    """One optimizer step of a candidate, on a model of its own."""
    model = build(device)
    words = model.config.vocab_size
    ids = torch.randint(0, words, (candidate.tokens // TOKENS, TOKENS), device=device)
    stack = ExitStack()
    method = _method(model, candidate, stack)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    surgery = gs.attach(method, model, optimizer) if method is not None else None

    def run() -> None:
        if surgery is not None:
            surgery.backward({"input_ids": ids, "labels": ids})
        else:
            outputs = model(input_ids=ids, use_cache=False)
            gs.losses.causal_lm(outputs, {"labels": ids}, {}).backward()  # the surgery's loss: both take its memory
        optimizer.step()
        optimizer.zero_grad()

    run.open = stack  # type: ignore[attr-defined]  # what would fold back when it is let go
    return run


def _method(model: LlamaForCausalLM, candidate: Candidate, stack: ExitStack) -> gs.Method | None:
    if candidate.kind in ("stock", "surgery"):
        return gs.methods.plain() if candidate.kind == "surgery" else None
    if candidate.kind == "column":
        basis = drawn_basis(model, candidate.dtype, candidate.kept)
        return gs.methods.gpm(basis, energy=None, gradient=candidate.gradient)
    plain = gs.estimators.identity_basis(model)
    basis = plain if candidate.kind == "plain" else drawn_basis(model, candidate.dtype, 1.0)
    device: Any = model.device
    drawn = {n: torch.rand(basis.rotated_shape(n), device=device) < candidate.kept for n in basis.sites}
    masks = gs.estimators.Masks.of(basis, drawn)
    if candidate.kind == "reparametrised":
        stack.enter_context(gs.reparametrised(model, basis, masks))
        return None
    return gs.methods.warp(basis, masks, gradient=candidate.gradient)


def covariances(device: str) -> tuple[Callable[[], None], dict[str, Callable[[], None]]]:
    """A forward pass over 4,096 tokens, and the same with second moments of every layer's input."""
    model = build(device).eval()
    ids = torch.randint(0, model.config.vocab_size, (4096 // TOKENS, TOKENS), device=device)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def collected(**options: Any) -> Callable[[], None]:
        def run() -> None:
            rows = Rows(**{"centre": False, "normalise": None, "winsorise": None, **options})
            collector = Collector(targets_of(model, "all-linear", "benchmark"), rows, True)
            collect(model, [{"input_ids": ids}], collector, "all", 0, DataDigest())

        return run

    return forward, {
        "forward against itself": forward,
        "second moments of all layers": collected(),
        "second moments, every token the same length": collected(normalise="token"),
    }


def eigenbases(device: str) -> dict[str, float]:
    """Seconds for the eigenvectors of all layers of SmolLM2-135M: 30 x (3 x 576, 1,536)."""
    torch.manual_seed(0)
    seconds = {}
    for width, count in ((WIDTH, 3), (NEURONS, 1)):
        x = torch.randn(2 * width, width, device=device) * torch.logspace(0, -3, width, device=device)
        matrix = x.T @ x / len(x)
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            eigenbasis(matrix)
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        seconds[str(width)] = min(taken)  # whatever else the machine does only adds
        seconds["all"] = seconds.get("all", 0.0) + LAYERS_OF_135M * count * seconds[str(width)]
    return seconds
