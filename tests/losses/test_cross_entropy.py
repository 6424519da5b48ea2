"""Cross-entropy in blocks against torch's own, in value, first and second derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import BatchError
from gradsurgery.losses.cross_entropy import IGNORED, cross_entropy_op


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype, scale: float, ignored: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(shape, generator=generator)).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return logits, targets.masked_fill(torch.rand(shape[:-1], generator=generator) < ignored, IGNORED)


def oracle(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.double().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**16),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 40)),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.floats(0.0, 50.0),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0, 1, 7, 64]),
)
def test_value_and_gradient(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, scale: float, ignored: float, chunk: int
) -> None:
    logits, targets = drawn(seed, shape, dtype, scale, ignored)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total, wanted = cross_entropy_op(one, targets, chunk)[0], oracle(other, targets)
    total.backward()
    wanted.backward()
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = 1 + float(logits.abs().max()) + float(torch.tensor(shape[-1]).log())  # of the terms of one row
    assert abs(float(total.detach()) - float(wanted.detach())) <= 16 * eps * targets.numel() * size
    assert one.grad is not None and other.grad is not None
    rounding = torch.finfo(dtype).eps + 16 * eps * size
    assert (one.grad.double() - other.grad.double()).abs().max() <= rounding
    assert not one.grad[targets == IGNORED].any()


def test_derivatives_are_exact() -> None:
    logits, targets = drawn(0, (2, 4, 7), torch.float64, 1.0, 0.3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy_op(x, targets, 8)[0], (logits,))
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy_op(x, targets, 8)[0], (logits,))


def test_forbidden_words_and_uncounted_rows() -> None:
    logits, targets = drawn(1, (2, 3, 9), torch.float32, 1.0, 0.0)
    targets[0, 1] = IGNORED
    logits[..., 8] = -torch.inf
    logits[0, 1] = torch.nan
    targets[targets == 8] = 0
    logits.requires_grad_()
    total, _ = cross_entropy_op(logits, targets, 0)
    total.backward()
    kept = targets != IGNORED
    assert logits.grad is not None
    wanted = oracle(logits.detach()[kept], targets[kept])
    assert float(total.detach()) == pytest.approx(float(wanted), rel=1e-6)
    assert not logits.grad[0, 1].any() and not logits.grad[kept][:, 8].any()


def test_strided_logits() -> None:
    logits, targets = drawn(2, (5, 3, 11), torch.float32, 1.0, 0.2)
    turned = logits.transpose(0, 1)
    total, _ = cross_entropy_op(turned, targets.t(), 0)
    assert float(total) == pytest.approx(float(oracle(turned, targets.t())), rel=1e-6)


def test_keeps_no_second_tensor_of_logits() -> None:
    logits, targets = drawn(3, (2, 8, 50), torch.float32, 1.0, 0.0)
    logits.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        cross_entropy_op(logits, targets, 0)
    assert [x.data_ptr() for x in kept if x.numel() >= logits.numel()] == [logits.data_ptr()]


def test_compiles_into_one_graph() -> None:
    logits, targets = drawn(4, (2, 8, 50), torch.float32, 1.0, 0.2)
    compiled = torch.compile(lambda x, t: cross_entropy_op(x, t, 0)[0], fullgraph=True, backend="aot_eager")
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled(one, targets).backward()
    cross_entropy_op(other, targets, 0)[0].backward()
    assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_labels_of_another_shape() -> None:
    outputs = type("Outputs", (), {"logits": torch.zeros(2, 5, 7)})()
    with pytest.raises(BatchError, match=r"labels \[2, 4\] do not fit logits \[2, 5, 7\]"):
        gs.losses.causal_lm(outputs, {"labels": torch.zeros(2, 4, dtype=torch.long)}, {})
