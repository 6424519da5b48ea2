"""Importances against gradients of ``W~`` itself; exact top-k masks against sorting; the algebra of masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, BatchError, PlanError, SelectionError
from gradsurgery.estimators.importance import Importance
from gradsurgery.estimators.masks import Masks
from tests.estimators.test_basis import basis_of, batch
from tests.surgery.tiny import build, weights
from tests.transforms.cases import case

estimators: Any = gs.estimators
few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def loss_of(outputs: Any, rows: Any, refs: Any) -> Tensor:
    return outputs["logits"].tanh().square().mean()


def by_hand(model: Any, basis: Any, batches: list[dict[str, Any]], loss: Any) -> dict[str, Tensor]:
    """``sum |dL/dW~|`` with ``W~`` as the leaf that autograd differentiates by."""
    total: dict[str, Tensor] = {}
    for rows in batches:
        leaves, made = {}, {}
        for name, site in basis.sites.items():
            weight, u = model.get_parameter(name).detach(), basis[name].to(torch.float64)
            matrices = site.layout.matrices(weight)
            leaves[name] = (matrices @ u if basis.side == "input" else u.mT @ matrices).requires_grad_()
            back = leaves[name] @ u.mT if basis.side == "input" else u @ leaves[name]
            made[name] = site.layout.weight(back, tuple(weight.shape))
        inputs = {k: v for k, v in rows.items() if k != "labels"}
        loss(functional_call(model, made, (), inputs), rows, {}).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            total[name] = total.get(name, 0) + leaf.grad.abs()  # type: ignore[operator]
    return total


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "vit"])
def test_scores_are_gradients_of_the_rotated_weight(name: str, side: str) -> None:
    here = case(name)
    model = here.copy()
    basis = basis_of(model, [here.batch], side=side)
    wanted = by_hand(model, basis, [here.batch, here.rows(slice(0, 2))], loss_of)
    for form in ("entry", "row", "column"):
        found = estimators.importance(model, basis, [here.batch, here.rows(slice(0, 2))], loss_of, form=form)
        for parameter, scores in wanted.items():
            own = scores if form == "entry" else scores.sum(-1 if form == "row" else -2, keepdim=True)
            assert found[parameter].dtype == torch.float64  # of a float64 model; else fp32
            torch.testing.assert_close(found[parameter], own / 2, rtol=1e-5, atol=1e-5 * float(own.max()))


def test_what_counts_the_same() -> None:
    model = build().double()
    basis = basis_of(model, [batch()], "mlp")
    batches = [batch(rows=2, seed=1), batch(rows=5, seed=2)]
    counts = [float((rows["labels"][:, 1:] != -100).sum()) for rows in batches]
    plain = gs.losses.causal_lm
    singles = [{k: v[i : i + 1] for k, v in rows.items()} for rows in batches for i in range(len(rows["input_ids"]))]
    each = [by_hand(model, basis, [rows], plain) for rows in batches]
    wanted = {
        "batch": {n: (each[0][n] + each[1][n]) / 2 for n in basis.sites},
        "token": {n: (counts[0] * each[0][n] + counts[1] * each[1][n]) / sum(counts) for n in basis.sites},
        "sample": {n: s / 7 for n, s in by_hand(model, basis, singles, plain).items()},
    }
    for per, scores in wanted.items():
        found = estimators.importance(model, basis, batches, per=per)
        for name in basis.sites:
            torch.testing.assert_close(found[name], scores[name], rtol=1e-5, atol=1e-9)


def test_gradients_and_modes_come_back() -> None:
    model = build().train()
    basis = basis_of(model, [batch()], "mlp")
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(k)) if k % 2 else None
        p.requires_grad_(k % 3 > 0)
    before = {n: (p.grad, p.requires_grad) for n, p in model.named_parameters()}
    values = weights(model)
    estimators.importance(model, basis, [batch()])
    nan = lambda outputs, rows, refs: outputs.logits.sum() * float("nan")  # noqa: E731
    with pytest.raises(BatchError, match="batch 0: the loss is nan"):
        estimators.importance(model, basis, [batch()], nan)
    assert all(p.grad is before[n][0] and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    assert model.training and not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_half_precision_gradients_are_summed_in_fp32() -> None:
    model = build().to(torch.bfloat16)
    basis = basis_of(model, [batch()], "down_proj")
    once = estimators.importance(model, basis, [batch()])
    often = estimators.importance(model, basis, [batch()] * 300)  # bf16 sums stall long before
    for name in basis.sites:
        assert often[name].dtype == torch.float32
        torch.testing.assert_close(often[name], once[name], rtol=1e-4, atol=1e-9)


def scores_of(basis: Any, data: st.DataObject) -> Importance:
    """Scores with many ties and zeros, over many magnitudes."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    levels = torch.tensor([0.0, 0.0, 1e-30, 1e-8, 0.25, 0.25, 1.0, 3e38])
    scores = {}
    for name in basis.sites:
        shape = basis.rotated_shape(name)
        drawn = levels[torch.randint(0, data.draw(st.integers(1, 8)), shape, generator=generator)]
        scores[name] = drawn if data.draw(st.booleans()) else torch.rand(shape, generator=generator)
    return Importance(basis, "entry", scores, {})


@few
@given(st.data())
def test_masks_hold_exactly_the_largest(data: st.DataObject) -> None:
    basis = estimators.identity_basis(build(), "mlp")
    scores = scores_of(basis, data)
    ratio = data.draw(st.floats(0.01, 1.0))
    layer, whole = estimators.top_k(scores, ratio), estimators.top_k(scores, ratio, "global")
    flat = torch.cat([scores[name].flatten() for name in basis.sites])
    order = torch.sort(flat, descending=True, stable=True).indices[: round(ratio * flat.numel())]
    wanted = torch.zeros_like(flat).bool().index_fill_(0, order, True)
    assert torch.equal(torch.cat([whole[name].flatten() for name in basis.sites]), wanted)
    for name in basis.sites:
        own = scores[name].flatten()
        order = torch.sort(own, descending=True, stable=True).indices[: round(ratio * own.numel())]
        assert torch.equal(layer[name].flatten(), torch.zeros_like(own).bool().index_fill_(0, order, True))
    assert whole.count() == round(ratio * flat.numel())


def test_sparse_importances_freeze_no_more_than_asked() -> None:
    basis = estimators.identity_basis(build(), "down_proj")
    scores = {n: torch.zeros(basis.rotated_shape(n)) for n in basis.sites}
    for own in scores.values():
        own.view(-1)[::20] = 1.0  # 5% are not zero; a quantile at 90% is zero, and takes everything
    masks = estimators.top_k(Importance(basis, "entry", scores, {}), 0.1)
    for name, own in scores.items():
        assert masks.count(name) == round(0.1 * own.numel())
        assert masks[name][own > 0].all()


@few
@given(st.data())
def test_the_algebra_of_masks(data: st.DataObject) -> None:
    basis = estimators.identity_basis(build(), "mlp")
    names = list(basis.sites)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    draw = lambda: {  # noqa: E731
        n: torch.rand(basis.rotated_shape(n), generator=generator) < 0.5
        for n in data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    }
    a, b = draw(), draw()
    first, second = Masks.of(basis, a), Masks.of(basis, b)
    for found, op in (
        (first | second, lambda x, y: x | y),
        (first & second, lambda x, y: x & y),
        (first - second, lambda x, y: x & ~y),
    ):
        for name in {*a, *b}:
            none = torch.zeros(basis.rotated_shape(name)).bool()
            assert torch.equal(found[name], op(a.get(name, none), b.get(name, none)))
        assert found.count() == sum(int(found[n].sum()) for n in found)
    assert all(torch.equal((~first)[n], ~a[n]) for n in a)
    assert first.overlap(first) == 1.0 and first.overlap(~first) == 0.0


def test_rows_and_columns_stand_for_their_entries() -> None:
    model = build()
    basis = basis_of(model, [batch()], "mlp")
    for form in ("row", "column"):
        scores = estimators.importance(model, basis, [batch()], form=form)
        masks = estimators.top_k(scores, 0.25)
        for name in masks:
            full = masks[name].expand(basis.rotated_shape(name))
            assert (
                masks.count(name)
                == int(full.sum())
                == round(0.25 * masks[name].numel()) * full.numel() // masks[name].numel()
            )


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "form": (lambda m, b: estimators.importance(m, b, [batch()], form="layer"), PlanError, "form is entry"),
    "per": (lambda m, b: estimators.importance(m, b, [batch()], per="word"), PlanError, "per is batch"),
    "no batches": (lambda m, b: estimators.importance(m, b, []), BatchError, "no batches"),
    "one batch": (lambda m, b: estimators.importance(m, b, batch()), PlanError, r"\[batch\]"),
    "another model": (
        lambda m, b: estimators.importance(build("gpt_neo"), b, [batch()]),
        SelectionError,
        "another model",
    ),
    "ratio": (lambda m, b: estimators.top_k(estimators.importance(m, b, [batch()]), 0.0), PlanError, "ratio"),
    "none": (lambda m, b: estimators.top_k(estimators.importance(m, b, [batch()]), 1e-4), SelectionError, "to none"),
    "nan": (
        lambda m, b: estimators.top_k(
            Importance(b, "entry", {n: torch.full((2,), torch.nan) for n in b.sites}, {}), 0.5
        ),
        BatchError,
        "nan or negative",
    ),
    "shape": (
        lambda m, b: Masks.of(b, {next(iter(b)): torch.ones(3, 3).bool()}),
        SelectionError,
        "its coordinates are",
    ),
    "dtype": (lambda m, b: Masks.of(b, {next(iter(b)): torch.ones(24, 20)}), SelectionError, "bool"),
    "two bases": (
        lambda m, b: Masks.of(b, {}) | Masks.of(estimators.identity_basis(m, "mlp"), {}),
        ArtefactError,
        "different bases",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence(name: str) -> None:
    call, error, message = BAD[name]
    model = build()
    basis = basis_of(model, [batch()], "down_proj")
    with pytest.raises(error, match=message):
        call(model, basis)


def test_weights_that_no_gradient_reaches_are_named() -> None:
    model = build()
    basis = basis_of(model, [batch()], "mlp")
    early = lambda outputs, rows, refs: outputs.hidden_states[1].mean()  # noqa: E731
    model.config.output_hidden_states = True
    with pytest.raises(BatchError, match=r"no gradient reaches model.layers.1"):
        estimators.importance(model, basis, [batch()], early)
