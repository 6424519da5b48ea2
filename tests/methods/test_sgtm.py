"""SGTM's gradients are, entry for entry, those that the original procedure defines.

The oracle is the procedure by hand on stock GPT-Neo, one label a batch: forward with slices of the activations zeroed
or detached through plain hooks, then slices of the gradient set to zero (arXiv 2512.05648, section 3, and its released
code).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError

HEADS, HEAD_DIM, WIDTH, NEURONS, VOCABULARY, TOKENS = 4, 8, 32, 48, 61, 7
FORGET_HEADS, FORGET_NEURONS = 1, 5
R, H = NEURONS - FORGET_NEURONS, (HEADS - FORGET_HEADS) * HEAD_DIM
STRATEGIES = ("mask", "detach", "zero")
ATOL = 1e-8  # GPT-Neo computes attention scores in fp32, also in a float64 model


@pytest.fixture(scope="module")
def model() -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=3,
        num_heads=HEADS,
        intermediate_size=NEURONS,
        attention_types=[[["global", "local", "global"], 1]],
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoForCausalLM(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def anatomy(model: GPTNeoForCausalLM) -> gs.Anatomy:
    return gs.dissect(model)


def forget_units(anatomy: gs.Anatomy, layers: list[int] | None = None) -> gs.Units:
    return gs.methods.forget_units(anatomy, heads=FORGET_HEADS, neurons=FORGET_NEURONS, layers=layers)


def loss_sum(model: GPTNeoForCausalLM, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY).double(), ids[:, 1:].reshape(-1), reduction="sum")


@contextmanager
def edited_activations(model: GPTNeoForCausalLM, how: str, layers: list[int]) -> Iterator[None]:
    """The originals' forward modes: which slice of what ``c_proj`` and ``out_proj`` read is zeroed or detached."""
    handles = []

    def edit(cut: slice, zeroed: bool):
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            x = args[0].clone()
            x[..., cut] = 0 if zeroed else x[..., cut].detach()
            return (x,)

        return hook

    for layer in layers:
        block = model.transformer.h[layer]
        for module, boundary in ((block.mlp.c_proj, R), (block.attn.attention.out_proj, H)):
            cut = slice(boundary, None) if how == "retain" else slice(0, boundary)
            handles.append(module.register_forward_pre_hook(edit(cut, how in ("retain", "zero"))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def original(model: GPTNeoForCausalLM, ids: Tensor, label: str, strategy: str, options: dict) -> dict[str, Tensor]:
    """Gradient of the summed loss of one batch under one label."""
    layers = options.get("layers") or [0, 1, 2]
    model.zero_grad()
    edit = "retain" if label == "retain" else strategy if label == "forget" and strategy != "mask" else None
    if edit:
        with edited_activations(model, edit, layers):
            loss_sum(model, ids).backward()
    else:
        loss_sum(model, ids).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if label != "forget":
        return grads
    if strategy == "mask":
        for layer in layers:
            attn, mlp = f"transformer.h.{layer}.attn.attention.", f"transformer.h.{layer}.mlp."
            for name in ("q_proj", "k_proj", "v_proj"):
                grads[f"{attn}{name}.weight"][:H] = 0
            grads[f"{mlp}c_fc.weight"][:R] = 0
            grads[f"{mlp}c_fc.bias"][:R] = 0
            if "attention_projection" not in options.get("joint", ()):
                grads[f"{attn}out_proj.weight"][:, :H] = 0
                grads[f"{attn}out_proj.bias"].zero_()
            if "mlp_projection" not in options.get("joint", ()):
                grads[f"{mlp}c_proj.weight"][:, :R] = 0
                grads[f"{mlp}c_proj.bias"].zero_()
    if options.get("embeddings") == "retain":
        grads["transformer.wte.weight"].zero_()
        grads["transformer.wpe.weight"].zero_()
    if options.get("norms") == "retain":
        for layer in layers:
            for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
                grads[f"transformer.h.{layer}.{name}"].zero_()
    return grads


def ours(model: GPTNeoForCausalLM, method: gs.Method, ids: Tensor, labels: list[str]) -> dict[str, Tensor]:
    model.zero_grad()
    columns = {c: torch.tensor([label == c for label in labels]) for c in ("forget", "retain")}
    with gs.attach(method, model) as surgery:
        surgery.backward({"input_ids": ids, **columns}, num_items=1)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return grads


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, grad in expected.items():
        scale = max(float(grad.abs().max()), 1.0)
        torch.testing.assert_close({name: got[name]}, {name: grad}, atol=ATOL * scale, rtol=0)
        assert not got[name][grad == 0].any(), f"{name}: entries that the original leaves at zero"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"embeddings": "retain"},
    {"norms": "retain"},
    {"embeddings": "retain", "norms": "retain", "layers": [0, 2]},
    {"joint": ["mlp_projection"]},
    {"joint": ["attention_projection", "mlp_projection"]},
]


# joint projections are a variant of parameter masking alone
CASES = [(s, o) for s in STRATEGIES for o in OPTIONS if s == "mask" or "joint" not in o]


@pytest.mark.parametrize(("strategy", "options"), CASES, ids=str)
@pytest.mark.parametrize("label", ["forget", "retain", "default"])
def test_gradients_equal_the_original_procedure(model, anatomy, label: str, strategy: Any, options: dict) -> None:
    ids = torch.randint(0, VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    given = {k: v for k, v in options.items() if k != "layers"}
    method = gs.methods.sgtm(anatomy, forget_units(anatomy, options.get("layers")), strategy, **given)
    assert_equal(ours(model, method, ids, [label] * 3), original(model, ids, label, strategy, options))


@settings(max_examples=15, deadline=None)
@given(
    labels=st.lists(st.sampled_from(["forget", "retain", "default"]), min_size=1, max_size=6),
    strategy=st.sampled_from(STRATEGIES),
    options=st.sampled_from(OPTIONS[:4]),
    seed=st.integers(0, 99),
)
def test_mixed_batch_equals_its_parts_one_after_the_other(model, anatomy, labels, strategy, options, seed) -> None:
    ids = torch.randint(0, VOCABULARY, (len(labels), TOKENS), generator=torch.Generator().manual_seed(seed))
    method = gs.methods.sgtm(
        anatomy,
        forget_units(anatomy, options.get("layers")),
        strategy,
        **{k: v for k, v in options.items() if k != "layers"},
    )
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for label in set(labels):
        rows = [i for i, mine in enumerate(labels) if mine == label]
        for name, grad in original(model, ids[rows], label, strategy, options).items():
            expected[name] += grad
    got = ours(model, method, ids, labels)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=ATOL * max(float(grad.abs().max()), 1.0), rtol=0)


def test_removal_leaves_what_retain_rows_saw(model, anatomy) -> None:
    import copy

    forget = forget_units(anatomy)
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), gs.applied(model, gs.zero(forget)):
        seen = model(input_ids=ids).logits
    removed = copy.deepcopy(model)
    gs.ablate_(removed, forget)
    with torch.no_grad():
        torch.testing.assert_close(removed(input_ids=ids).logits, seen, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"strategy": "prune"}, PlanError),
        ({"embeddings": "forget"}, PlanError),
        ({"norms": None}, PlanError),
        ({"joint": ["mlp"]}, PlanError),
        ({"joint": ["mlp"], "strategy": "zero"}, PlanError),
        ({"joint": "attention"}, PlanError),
        ({"joint": ["mlp_projection"], "strategy": "detach"}, PlanError),
        ({"joint": ["attention", "attention_projection"], "strategy": "zero"}, PlanError),
    ],
    ids=str,
)
def test_unknown_options_are_named(anatomy, options: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match="sgtm"):
        gs.methods.sgtm(anatomy, forget_units(anatomy), **options)


def test_plain_regions_are_refused(model, anatomy) -> None:
    with pytest.raises(SelectionError, match="units_within"):
        gs.methods.sgtm(anatomy, gs.region(model, "transformer.h.0.*"))


@pytest.mark.parametrize(
    "numbers",
    [{}, {"heads": 1, "percent": 5.0}, {"percent": 0}, {"percent": 100}, {"heads": 4}, {"neurons": 48}],
    ids=str,
)
def test_forget_units_refuses_what_leaves_nothing(anatomy, numbers: dict) -> None:
    with pytest.raises(SelectionError):
        gs.methods.forget_units(anatomy, **numbers)


def test_percent_is_of_every_group(anatomy) -> None:
    units = gs.methods.forget_units(anatomy, percent=25.0)
    assert units == anatomy.heads[:, -1:] | anatomy.neurons[:, -12:]


def test_data_filter_trains_on_the_rows_without_the_label(model) -> None:
    ids = torch.randint(0, VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(3))
    labels = ["forget", "default", "retain", "forget"]
    got = ours(model, gs.methods.data_filter(), ids, labels)
    model.zero_grad()
    loss_sum(model, ids[1:3]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad * 1.0, atol=1e-7, rtol=1e-6)
