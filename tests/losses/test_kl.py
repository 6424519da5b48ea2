"""`gs.losses.kl` against the obvious computation in float64, over shapes, dtypes, masks, layouts and temperatures."""

from __future__ import annotations

import time
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
from tests.losses import oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, reference = (scale * torch.randn(2, *shape, generator=generator)).to(dtype)
    return logits, reference, torch.randint(0, 2, shape[:-1], generator=generator)


def rounding(logits: Tensor, temperature: float) -> float:
    """What fp32 (float64) arithmetic loses on terms of the size of log-probabilities."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return 16 * torch.finfo(work).eps * (1 + float(logits.abs().max()) / temperature)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(2, 90)),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.5, 2.0, 7.3]),
    reverse=st.booleans(),
    masked=st.booleans(),
    chunk=st.sampled_from([None, 1, 7, 64, 1000]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_are_the_oracles(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    temperature: float,
    reverse: bool,
    masked: bool,
    chunk: int | None,
    seed: int,
) -> None:
    logits, reference, mask = draw(shape, dtype, seed)
    mask_given = mask if masked else None
    options: dict[str, Any] = {"direction": "reverse" if reverse else "forward", "chunk_size": chunk}
    value, grad = oracle.gradient(oracle.ours, logits, reference, mask_given, temperature=temperature, **options)
    expected, exact = oracle.gradient(oracle.kl, logits.double(), reference, mask_given, temperature, reverse)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    close = rounding(logits, temperature)
    assert abs(float(value) - float(expected)) <= close * (1 + float(expected))
    # q - p of probabilities up to 1 loses their rounding, not its own; reverse, q times a difference of logarithms
    positions = max(int(mask.sum()) if masked else mask.numel(), 1)
    terms = 1 + 2 * float(logits.abs().max()) / temperature if reverse else 1.0
    stored = torch.finfo(dtype)
    allowed = close * terms / temperature / positions + stored.eps * float(exact.abs().max()) + stored.tiny
    assert float((grad.double() - exact).abs().max()) <= allowed
    if masked:
        assert not grad[mask == 0].any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradcheck(direction: Any, temperature: float) -> None:
    logits, reference, mask = draw((2, 3, 11), torch.float64, 0)
    torch.autograd.gradcheck(
        lambda x: oracle.ours(x, reference, mask, direction=direction, temperature=temperature),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_divergence_from_itself(direction: Any, dtype: torch.dtype) -> None:
    logits, _, mask = draw((2, 5, 33), dtype, 1)
    value, grad = oracle.gradient(oracle.ours, logits, logits.clone(), mask, direction=direction, temperature=1.3)
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_garbage_at_positions_that_do_not_count(direction: Any) -> None:
    logits, reference, mask = draw((3, 4, 9), torch.float32, 2)
    mask[1] = 0
    mask[0, 0] = 1
    clean = oracle.gradient(oracle.ours, logits, reference, mask, direction=direction)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        spoilt = logits.masked_fill(mask[..., None] == 0, garbage)
        other = reference.masked_fill(mask[..., None] == 0, garbage)
        value, grad = oracle.gradient(oracle.ours, spoilt, other, mask, direction=direction)
        assert torch.equal(value, clean[0])
        assert torch.equal(grad, clean[1])


def test_no_position_counts() -> None:
    logits, reference, mask = draw((2, 3, 5), torch.float32, 3)
    value, grad = oracle.gradient(oracle.ours, logits, reference, torch.zeros_like(mask))
    assert value == 0
    assert not grad.any()
    assert grad.isfinite().all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_forbidden_words(direction: Any) -> None:
    logits, reference, _ = draw((2, 3, 20), torch.float32, 4)
    logits[..., 5:15] = reference[..., 5:15] = -torch.inf
    value, grad = oracle.gradient(oracle.ours, logits, reference, chunk_size=4, direction=direction)
    kept = [*range(5), *range(15, 20)]
    alone = oracle.gradient(oracle.ours, logits[..., kept], reference[..., kept], direction=direction)
    torch.testing.assert_close(value, alone[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[..., kept], alone[1], rtol=1e-5, atol=1e-8)
    assert not grad[..., 5:15].any()


def test_words_that_one_side_forbids() -> None:
    logits, reference, _ = draw((1, 2, 6), torch.float32, 5)
    forbids = logits.clone()
    forbids[..., 0] = -torch.inf
    assert oracle.ours(forbids, reference) == torch.inf
    assert oracle.ours(reference, forbids, direction="reverse") == torch.inf
    assert oracle.ours(reference, forbids).isfinite()
    _, grad = oracle.gradient(oracle.ours, reference, forbids)
    assert grad.isfinite().all()


@pytest.mark.parametrize("offset", [1e4, -3e8, 1e30])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_very_large_logits(offset: float, direction: Any) -> None:
    logits = torch.tensor([[[0.0, 1.0, 1.0]]]) * offset
    reference = torch.tensor([[[1.0, 2.0, 0.5]]])
    value, grad = oracle.gradient(oracle.ours, logits, reference, direction=direction)
    expected, exact = oracle.gradient(oracle.kl, logits.double(), reference, None, reverse=direction == "reverse")
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-6, atol=1e-7)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same logits in other strides."""
    longer = torch.cat([x, x[:, :1]], 1)
    wider = torch.cat([x, x[..., :3]], 2)
    return {
        "a token less": longer[:, :-1],
        "a slice of the vocabulary": wider[..., : x.shape[-1]],
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }


@pytest.mark.parametrize("name", layouts(torch.zeros(1, 2, 3)))
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_strides_make_no_difference(name: str, direction: Any) -> None:
    logits, reference, mask = draw((3, 4, 17), torch.float32, 6)
    plain = oracle.gradient(oracle.ours, logits, reference, mask, direction=direction)
    strided = layouts(logits)[name]
    assert torch.equal(strided, logits)
    leaf = strided.detach().requires_grad_()
    value = oracle.ours(leaf, layouts(reference)[name], mask, direction=direction)
    value.backward()
    assert torch.equal(value, plain[0])
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, plain[1])


def test_dtypes_may_differ() -> None:
    logits, reference, mask = draw((2, 3, 17), torch.float32, 7)
    value, grad = oracle.gradient(oracle.ours, logits.bfloat16(), reference, mask)
    expected, exact = oracle.gradient(oracle.kl, logits.bfloat16().double(), reference, mask)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-8)


def test_classes_are_one_position_a_row() -> None:
    logits, reference, _ = draw((5, 9), torch.float32, 8)
    batch = {"input_ids": torch.ones(5, 3), "attention_mask": torch.ones(5, 3), "labels": torch.zeros(5)}
    value = gs.losses.kl_divergence(SimpleNamespace(logits=logits), batch, {"reference": reference})
    torch.testing.assert_close(value.double(), oracle.kl(logits, reference, None), rtol=1e-5, atol=0)
    assert gs.losses.kl_divergence.count(batch) == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_nothing_of_the_logits_size_is_saved(dtype: torch.dtype, direction: Any) -> None:
    logits, reference, mask = draw((3, 8, 50), dtype, 9)
    leaf = logits.clone().requires_grad_()
    logits = leaf * 1
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        value = oracle.ours(logits, reference, mask, direction=direction)
    large = {x.data_ptr() for x in saved if x.numel() >= reference.numel()}
    assert large == {logits.data_ptr(), reference.data_ptr()}
    assert sum(x.numel() for x in saved if x.data_ptr() not in large) <= 8 * mask.numel()
    value.backward()


def test_peak_memory_of_a_step_is_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor larger than a block is made, but for the gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        sizes: list[int] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            views = func.is_view or func.__name__.startswith(("view", "_unsafe", "detach", "alias"))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor) and not views and all(x is not a for a in args):
                    self.sizes.append(x.numel())
            return out

    logits, reference, mask = draw((4, 16, 300), torch.float32, 10)
    leaf = logits.requires_grad_()
    with Sizes() as sizes:
        oracle.ours(leaf, reference, mask, chunk_size=600).backward()
    assert sorted(sizes.sizes)[-1] == leaf.numel()
    assert sum(size >= leaf.numel() for size in sizes.sizes) <= 2  # the gradient, and its way into .grad
    assert all(size <= 3 * 600 for size in sizes.sizes if size < leaf.numel())


def test_second_derivatives_are_refused() -> None:
    logits, reference, _ = draw((1, 2, 5), torch.float32, 11)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(oracle.ours(leaf, reference), leaf, create_graph=True)
    with pytest.raises(PlanError, match="no second derivative"):
        grad.sum().backward()


def test_operators_keep_their_contracts() -> None:
    logits, reference, mask = draw((2, 3, 10), torch.float32, 12)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (logits.requires_grad_(), reference, mask != 0, 1.0, False, 0)
    torch.library.opcheck(torch.ops.gradsurgery.kl_divergence, args, test_utils=tests)


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_compiles_whole() -> None:
    logits, reference, mask = draw((2, 3, 40), torch.float32, 13)
    head = torch.nn.Linear(40, 40)

    def loss(x: Tensor) -> Tensor:
        return gs.losses.kl_divergence(head(x), {"attention_mask": mask}, {"reference": reference})

    compiled: Any = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, grad = oracle.gradient(compiled, logits)
    expected = oracle.gradient(loss, logits)
    torch.testing.assert_close(value, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-8)


def test_under_autocast() -> None:
    x, reference, mask = draw((2, 3, 16), torch.float32, 14)
    head = torch.nn.Linear(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
        value = oracle.ours(logits, reference, mask)
    assert logits.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), oracle.kl(logits.double(), reference, mask), rtol=1e-5, atol=1e-6)
    value.backward()
    assert head.weight.grad is not None


def test_matches_torch_where_torch_defines_it() -> None:
    logits, reference, _ = draw((2, 3, 16), torch.float32, 15)
    stock = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum") / 6
    torch.testing.assert_close(oracle.ours(logits, reference), stock, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("reference", "batch", "options", "message"),
    [
        (torch.zeros(2, 3, 6), {}, {}, "6 words, the model of 5"),
        (torch.zeros(2, 4, 5), {}, {}, r"positions \[2, 4\], the model \[2, 3\]"),
        (torch.zeros(2, 3, 5), {"attention_mask": torch.ones(2, 2)}, {}, r"the mask \[2, 2\]"),
        (torch.zeros(2, 3, 5), {"attention_mask": torch.ones(2, 1, 3, 3)}, {}, "does not say which positions"),
        (torch.zeros(2, 3, 5), {"input_ids": torch.ones(2, 3)}, {"mask": "completion_mask"}, "the batch has input_ids"),
        (None, {}, {}, "snapshot"),
        (torch.zeros(2, 3, 5).long(), {}, {}, "needs logits"),
        ({"logits": 1}, {}, {}, "needs logits"),
    ],
)
def test_bad_references(reference: Any, batch: dict[str, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        gs.losses.kl(**options)(SimpleNamespace(logits=torch.zeros(2, 3, 5)), batch, {"reference": reference})


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(1, 2, 3, 4), None])
def test_bad_logits(logits: Tensor | None) -> None:
    with pytest.raises(BatchError, match="logits"):
        gs.losses.kl_divergence(SimpleNamespace(logits=logits), {}, {"reference": torch.zeros(1, 1)})


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": float("nan")}, {"direction": "both"}, {"chunk_size": 0}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(options))):
        gs.losses.kl(**options)


def test_names_say_what_differs() -> None:
    assert gs.losses.kl().__name__ == gs.losses.kl_divergence.__name__ == "kl_divergence"
    assert gs.losses.kl(temperature=2.0, mask="labels").__name__ == "kl(temperature=2.0, mask='labels')"


@pytest.mark.benchmark
def test_as_fast_as_two_log_softmaxes() -> None:
    """Forward and backward at the size of GPT-2's vocabulary, one thread; measured 0.37 of stock."""
    shape = (4, 256, 50257)
    logits, reference, _ = draw(shape, torch.float32, 0)

    def stock(x: Tensor) -> Tensor:
        log_q, log_p = x.log_softmax(-1), reference.log_softmax(-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / (shape[0] * shape[1])

    def seconds(loss: Any) -> float:
        leaf = logits.detach().requires_grad_()
        start = time.perf_counter()
        loss(leaf).backward()
        return time.perf_counter() - start

    def plain(x: Tensor) -> Tensor:
        return oracle.ours(x, reference)

    ratios = sorted(seconds(plain) / seconds(stock) for _ in range(6))
    assert ratios[2] <= 1.0, ratios
