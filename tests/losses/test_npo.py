"""Negative preference optimization equals the paper's formula, written out in fp64, and its gradient autograd's."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError
from tests.losses.models import IDS, MASK, build, disturb_, inputs

ROWS, TOKENS, WORDS = 4, 6, 9


def draw(seed: int, scale: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of model and reference, and a batch whose rows have some labels, or none."""
    g = torch.Generator().manual_seed(seed)
    logits, reference = (scale * torch.randn(ROWS, TOKENS, WORDS, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, WORDS, (ROWS, TOKENS), generator=g)
    lengths = torch.randint(0, TOKENS + 1, (ROWS,), generator=g)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    mask = torch.where(torch.rand(ROWS, 1, generator=g) < 0.5, mask, mask.flip(1))  # padded on either side
    prompt = torch.rand(ROWS, TOKENS, generator=g) < 0.3
    labels = ids.masked_fill((mask == 0) | prompt, -100)
    return logits.requires_grad_(), reference, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def oracle(logits: Tensor, reference: Tensor, batch: dict[str, Tensor], beta: float) -> Tensor:
    """Row by row, token by token."""
    values = []
    for row in range(ROWS):
        ratio, counted = torch.zeros((), dtype=torch.float64), 0
        for t in range(TOKENS - 1):
            label = int(batch["labels"][row, t + 1])
            if label == -100 or not batch["attention_mask"][row, t]:
                continue
            ratio = ratio + logits[row, t].log_softmax(-1)[label] - reference[row, t].log_softmax(-1)[label]
            counted += 1
        if counted:
            values.append(2 / beta * torch.logaddexp(torch.zeros((), dtype=torch.float64), beta * ratio))
    return torch.stack(values).mean() if values else 0 * logits.sum()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.floats(1e-3, 10), scale=st.floats(1e-2, 100))
def test_value_and_gradient_are_the_formulas(seed: int, beta: float, scale: float) -> None:
    logits, reference, batch = draw(seed, scale)
    loss = gs.losses.npo(beta)
    value = loss(SimpleNamespace(logits=logits), batch, {"reference": reference})
    expected = oracle(logits, reference, batch, beta)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    mine, theirs = (torch.autograd.grad(v, logits, allow_unused=True)[0] for v in (value, expected))
    torch.testing.assert_close(mine, torch.zeros_like(logits) if theirs is None else theirs, rtol=1e-9, atol=1e-11)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].masked_fill(batch["attention_mask"] == 0, -100)
    assert loss.count(batch) == (shifted != -100).any(1).sum()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stable_where_the_formula_overflows(dtype: torch.dtype, sign: int) -> None:
    logits = torch.zeros(1, 2, WORDS, dtype=dtype)
    logits[..., 3] = sign * 3e4
    logits.requires_grad_()
    batch = {"input_ids": torch.full((1, 2), 3)}
    reference = torch.zeros(1, 2, WORDS) if sign < 0 else -logits.detach()
    value = gs.losses.npo(1.0)(SimpleNamespace(logits=logits), batch, {"reference": reference})
    value.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    expected = 0.0 if sign < 0 else 2 * 3e4  # forgotten: no loss; far likelier than the reference: the log-ratio itself
    assert value.item() == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_micro_batches_add_up_to_one_batch() -> None:
    model, batch = build("llama").double(), {"input_ids": IDS.repeat(2, 1), "attention_mask": MASK.repeat(2, 1)}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][2] = -100  # a row without labels is no sequence
    reference = gs.losses.frozen(copy.deepcopy(model))
    disturb_(model)
    method = gs.Method([gs.Pass("forget", gs.losses.npo(0.3), refs={"reference": reference})])
    with gs.attach(method, model) as surgery:
        assert surgery.count_items([batch])["forget"] == 3
        surgery.backward(batch)
        whole = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
        items = surgery.count_items(parts)
        for part in parts:
            surgery.backward(part, num_items=items)
    for name, p in model.named_parameters():
        # llama's norms and rotary tables are fp32 even here: rows of another batch round otherwise
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-5, atol=1e-6)


def test_cached_reference_equals_the_model(tmp_path: Path) -> None:
    model = build("llama")
    batch = {**inputs(), "labels": IDS.masked_fill(MASK == 0, -100)}
    full = gs.losses.precompute(tmp_path / "full", model, [batch])
    frozen = gs.losses.frozen(copy.deepcopy(model))
    disturb_(model)
    out = model(**inputs())
    loss = gs.losses.npo()
    values = [loss(out, batch, {"reference": reference(model, inputs())}) for reference in (full, frozen)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)


def test_bad_references(tmp_path: Path) -> None:
    logits = torch.zeros(2, 7, 31)
    batch: dict[str, Any] = {**inputs(), "labels": IDS}
    top = gs.losses.TopK.of(logits, k=4)
    for refs, message in (
        ({}, "no reference"),
        ({"teacher": logits}, "teacher"),
        ({"reference": top}, "likeliest words.*without top_k"),
        ({"reference": torch.zeros(2, 7, 30)}, "30 words, the model of 31"),
        ({"reference": torch.zeros(2, 6, 31)}, r"positions \[2, 6\], the model \[2, 7\]"),
        ({"reference": "logits"}, "needs logits"),
    ):
        with pytest.raises(BatchError, match=message):
            gs.losses.npo()(SimpleNamespace(logits=logits), batch, refs)
    with pytest.raises(BatchError, match="do not fit"):
        gs.losses.npo()(SimpleNamespace(logits=logits), {"labels": IDS[:, :5]}, {"reference": logits})


@pytest.mark.parametrize("beta", [0, -1.0, float("inf"), float("nan"), "0.1", True])
def test_bad_options(beta: Any) -> None:
    with pytest.raises(PlanError, match="beta"):
        gs.losses.npo(beta)


def test_names_say_what_differs() -> None:
    assert gs.losses.npo().__name__ == "npo(0.1)"
    assert gs.losses.npo(0.2, "teacher").__name__ == "npo(0.2, 'teacher')"


@pytest.mark.parametrize("top_k", [None, 4])
def test_rows_of_padding_alone_contribute_nothing(tmp_path: Path, top_k: int | None) -> None:
    """A collator may fill up a batch with them: to the divergence and to NPO they are not there, cached or not."""
    model = build("llama")
    short = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    blank = {"input_ids": 0 * IDS[:1], "attention_mask": 0 * MASK[:1], "labels": -100 + 0 * IDS[:1]}
    filled = {name: torch.cat([short[name], blank[name]]) for name in short}
    reference = gs.losses.precompute(tmp_path / "cache", model, [filled], top_k=top_k)
    disturb_(model)
    held = gs.Pass("held", gs.losses.kl_divergence, refs={"reference": reference})
    ascent = gs.Pass("forget", gs.losses.npo(), refs={"reference": gs.losses.frozen(build("llama"))})
    grads = []
    for batch in (short, filled):
        model.zero_grad()
        with gs.attach(gs.Method([held, ascent]), model) as surgery:
            losses = surgery.backward(batch)
            assert surgery.count_items([batch]) == {"held": MASK.sum(), "forget": 2}
        grads.append((losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    with gs.attach(gs.Method([held, ascent]), model) as surgery:
        model.zero_grad()
        assert all(value == 0 for value in surgery.backward(blank).values())
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
