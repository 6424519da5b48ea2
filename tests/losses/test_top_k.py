"""KL over the k likeliest words and the rest, against the merged distributions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError
from tests.losses import oracle
from tests.losses.test_kl import DTYPES, draw, rounding


def merged_kl(
    logits: Tensor, reference: Tensor, indices: Tensor, mask: Tensor, temperature: float, reverse: bool
) -> Any:
    log_q = oracle.merged((logits.double() / temperature).log_softmax(-1), indices)
    log_p = oracle.merged((reference.double() / temperature).log_softmax(-1), indices)
    return oracle.mean(oracle.divergence(*((log_q, log_p) if reverse else (log_p, log_q))), mask)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(3, 60)),
    k=st.integers(1, 59),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    direction=st.sampled_from(["forward", "reverse"]),
    chunk=st.sampled_from([None, 1, 100]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_are_the_oracles(
    shape: tuple[int, int, int], k: int, dtype: torch.dtype, temperature: float, direction: Any, chunk: Any, seed: int
) -> None:
    logits, reference, mask = draw(shape, dtype, seed)
    top = gs.losses.TopK.of(reference, min(k, shape[-1] - 1), temperature)
    options = {"temperature": temperature, "direction": direction, "chunk_size": chunk}
    value, grad = oracle.gradient(oracle.ours, logits, top, mask, **options)
    expected, exact = oracle.gradient(
        merged_kl, logits.double(), reference, top.indices, mask, temperature, direction == "reverse"
    )
    close = rounding(logits, temperature) * (1 + float(reference.abs().max()) / temperature)
    assert grad.dtype == dtype
    assert abs(float(value) - float(expected)) <= close * (1 + float(expected))
    stored = torch.finfo(dtype)
    assert float((grad.double() - exact).abs().max()) <= close / temperature + stored.eps * float(exact.abs().max())
    assert not grad[mask == 0].any()
    full = oracle.kl(logits, reference, mask, temperature, direction == "reverse")
    assert float(value) <= float(full) + close * (1 + float(full))  # merging outcomes never adds divergence


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck(direction: Any) -> None:
    logits, reference, mask = draw((2, 3, 11), torch.float64, 0)
    top = gs.losses.TopK.of(reference, 4)
    torch.autograd.gradcheck(lambda x: oracle.ours(x, top, mask, direction=direction), logits.requires_grad_())


def test_rest_of_vanishing_mass() -> None:
    """One minus the mass of the others would be zero here, or negative."""
    reference = torch.tensor([[[60.0, 59.0, 0.0, -1.0, -2.0]]])
    logits = torch.tensor([[[50.0, 50.0, 0.0, 2.0, -2.0]]])
    top = gs.losses.TopK.of(reference, 2)
    exact = oracle.merged(reference.double().log_softmax(-1), top.indices)
    torch.testing.assert_close(top.rest.double(), exact[..., -1], rtol=1e-6, atol=0)
    value, grad = oracle.gradient(oracle.ours, logits, top, direction="reverse")
    expected, wanted = oracle.gradient(merged_kl, logits.double(), reference, top.indices, torch.ones(1, 1), 1.0, True)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_forbidden_words(direction: Any) -> None:
    logits, reference, _ = draw((2, 3, 12), torch.float32, 1)
    logits[..., 3:] = reference[..., 3:] = -torch.inf  # the rest is impossible, and so are some of the top
    top = gs.losses.TopK.of(reference, 5)
    value, grad = oracle.gradient(oracle.ours, logits, top, direction=direction)
    expected, exact = oracle.gradient(oracle.ours, logits[..., :3], reference[..., :3], direction=direction)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad[..., :3], exact, rtol=1e-4, atol=1e-7)
    assert not grad[..., 3:].any()


def test_garbage_at_positions_that_do_not_count() -> None:
    logits, reference, mask = draw((3, 4, 9), torch.float32, 2)
    top = gs.losses.TopK.of(reference, 3)
    clean = oracle.gradient(oracle.ours, logits, top, mask)
    logits = logits.masked_fill(mask[..., None] == 0, torch.nan)
    off = mask[..., None] == 0
    top = gs.losses.TopK(
        top.log_probs.masked_fill(off, torch.nan), top.indices.masked_fill(off, 0), top.rest * 1, top.vocabulary
    )
    value, grad = oracle.gradient(oracle.ours, logits, top, mask)
    assert torch.equal(value, clean[0])
    assert torch.equal(grad, clean[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stores_stay_distributions(dtype: torch.dtype) -> None:
    logits, reference, _ = draw((2, 3, 50), torch.float32, 3)
    top = gs.losses.TopK.of(reference, 8)
    stored = gs.losses.TopK(top.log_probs.to(dtype), top.indices.int(), top.rest.to(dtype), 50)
    torch.testing.assert_close(stored.outcomes(torch.float32).exp().sum(-1), torch.ones(2, 3))
    value = oracle.ours(logits, stored)
    torch.testing.assert_close(value, oracle.ours(logits, top), rtol=8 * torch.finfo(dtype).eps, atol=1e-3)


def test_nothing_of_the_logits_size_is_saved() -> None:
    logits, reference, mask = draw((3, 8, 50), torch.float32, 4)
    top = gs.losses.TopK.of(reference, 4)
    logits = logits.requires_grad_() * 1
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        oracle.ours(logits, top, mask)
    assert {x.data_ptr() for x in saved if x.numel() >= logits.numel()} == {logits.data_ptr()}


def test_refusals() -> None:
    logits, reference, _ = draw((2, 3, 10), torch.float32, 5)
    top = gs.losses.TopK.of(reference, 4)
    with pytest.raises(BatchError, match=r"temperature 1\.0, the loss asks for 2\.0"):
        oracle.ours(logits, top, temperature=2.0)
    with pytest.raises(BatchError, match="10 words, the model of 9"):
        oracle.ours(logits[..., :9], top)
    for k in (0, 10):
        with pytest.raises(BatchError, match=f"top {k} of 10"):
            gs.losses.TopK.of(reference, k)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(oracle.ours(leaf, top), leaf, create_graph=True)
    with pytest.raises(PlanError, match="no second derivative"):
        grad.sum().backward()
