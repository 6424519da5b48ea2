"""``gs.applied`` leaves nothing behind, and says no before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradsurgery as gs
from conftest import tiny_llama
from gradsurgery.errors import BatchError, KeyStateError, PlanError, SelectionError
from tests.transforms.cases import BATCH, FAST, case, gradients

IS_FLAGGED = torch.tensor([True, False, True, False])


def fingerprint(model: torch.nn.Module) -> list[Any]:
    out: list[Any] = []
    for path, module in model.named_modules():
        out.append((path, id(module), type(module), sorted(vars(module)), id(module.forward.__func__)))
        out.append({name: id(p) for name, p in module._parameters.items()})
        out.append([len(hooks) for name, hooks in sorted(vars(module).items()) if name.endswith("_hooks")])
    return out


@pytest.mark.parametrize("name", FAST)
def test_nothing_is_left_behind(name: str) -> None:
    c = case(name)
    forget = c.anatomy.heads[:, -1:]
    if c.anatomy.neurons.chosen:  # a state-space model has none
        forget = forget | c.anatomy.neurons[:, -3:]
    transforms = (
        gs.mask(c.anatomy.rest(forget), where=IS_FLAGGED),
        gs.zero(forget, where=~IS_FLAGGED),
        gs.scale(forget, -0.75),
    )
    before, keys = fingerprint(c.model), list(c.model.state_dict())
    stock = gradients(c.model, c.loss())
    with gs.applied(c.model, *transforms):
        assert [type(m) for m in c.model.modules()] == [entry[2] for entry in before[::3]]
        assert list(c.model.state_dict()) == keys
        c.loss()
    with pytest.raises(RuntimeError, match="stop"), gs.applied(c.model, *transforms):
        c.loss()
        raise RuntimeError("stop")
    assert fingerprint(c.model) == before
    after = gradients(c.model, c.loss())
    assert all(torch.equal(stock[name], after[name]) for name in stock)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss"])
def test_an_exception_inside_a_module_leaves_nothing_behind(name: str) -> None:
    c = case(name)
    before = fingerprint(c.model)
    forget = c.anatomy.neurons[:, -3:]
    bad = {**c.batch, "input_ids": c.batch["input_ids"] + 10**6}
    with pytest.raises(IndexError), gs.applied(c.model, gs.mask(~forget), gs.zero(forget)):
        c.loss(batch=bad)
    assert fingerprint(c.model) == before


def test_flags_that_do_not_fit() -> None:
    c = case("llama")
    forget = c.anatomy.neurons[:, -3:]
    for where in (torch.tensor([True, False, True]), torch.ones(BATCH), torch.ones(1, 2, 3, dtype=torch.bool)):
        with pytest.raises(BatchError), gs.applied(c.model, gs.mask(forget, where=where)):
            c.loss()
    with (
        pytest.raises(BatchError, match="no label column 'forget'"),
        gs.applied(c.model, gs.mask(forget, where="forget")),
    ):
        c.loss()


def test_columns_that_flag_nobody_are_legal() -> None:
    c = case("llama")
    none = torch.zeros(BATCH, dtype=torch.bool)
    stock = gradients(c.model, c.loss())
    forget = c.anatomy.heads[:, -1:]
    with gs.applied(c.model, gs.mask(~forget, where=none), gs.zero(forget, where=none), gs.detach(forget, where=none)):
        found = gradients(c.model, c.loss())
    for name, gradient in stock.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_what_does_nothing_is_refused() -> None:
    c, other = case("llama"), case("gpt2")
    empty = c.anatomy.neurons[:, :0]
    for make in (gs.mask, gs.zero, gs.detach, lambda r: gs.scale(r, 2.0)):
        with pytest.raises(SelectionError):
            make(empty)
    for make in (gs.zero, gs.detach):
        with pytest.raises(SelectionError, match="units_within"):
            make(~c.anatomy.neurons[:, :1])  # type: ignore[arg-type]
    with (
        pytest.raises(SelectionError, match="another model"),
        gs.applied(other.model, gs.mask(c.anatomy.neurons[:, :1])),
    ):
        pass
    with pytest.raises(PlanError, match="no forward"), gs.applied(c.model, gs.mask(c.anatomy.neurons[:, :1])):
        pass
    for factor in (float("nan"), float("inf"), "half"):
        with pytest.raises(PlanError):
            gs.scale(c.anatomy.neurons[:, :1], factor)


def test_position_distances_cannot_tell_examples_apart() -> None:
    c = case("t5")
    shared = c.anatomy.structure("shared relative position bias")
    with pytest.raises(BatchError, match="Leave"), gs.applied(c.model, gs.mask(shared, where=IS_FLAGGED)):
        c.loss()
    short = {
        name: v[:, :BATCH] if isinstance(v, torch.Tensor) else v for name, v in c.batch.items()
    }  # as many tokens as rows
    with pytest.raises(BatchError, match="distances"), gs.applied(c.model, gs.mask(shared, where=IS_FLAGGED)):
        c.outputs(batch=short)
    for where in (None, torch.ones(BATCH, dtype=torch.bool)):
        with gs.applied(c.model, gs.mask(shared, where=where)):
            found = gradients(c.model, c.loss())
        assert not any(found[name].count_nonzero() for name in shared.entries)


class _Reader(nn.Module):
    """Reads its child's weight instead of calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.called = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.child.weight)


class _SecretReader(nn.Module):
    """The same, so that its source does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.called = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), next(self.children()).weight)  # type: ignore[arg-type]


def test_a_weight_that_its_parent_reads_is_masked_there() -> None:
    model, x, where = _Reader(), torch.randn(4, 2, 3), torch.tensor([True, False, False, True])
    with gs.applied(model, gs.mask(gs.region(model, "child.weight"), where=where)):
        model(x).sum().backward()
    assert model.child.weight.grad is not None
    found = model.child.weight.grad.clone()
    model.zero_grad()
    model(x[~where]).sum().backward()
    torch.testing.assert_close(found, model.child.weight.grad)


def test_a_weight_that_nobody_is_seen_to_read_is_an_error() -> None:
    model = _SecretReader()
    mask = gs.mask(gs.region(model, ["child.weight", "called.weight"]))
    with pytest.raises(PlanError, match=r"child.*was not called"), gs.applied(model, mask):
        model(torch.randn(4, 2, 3))


def test_tied_weights_are_reached_under_both_names() -> None:
    c = case("gpt2")
    table = gs.region(c.model, "lm_head.weight")
    assert table == gs.region(c.model, "transformer.wte.weight")
    with gs.applied(c.model, gs.mask(table)):
        found = gradients(c.model, c.loss())
    assert not found["transformer.wte.weight"].count_nonzero()


def test_a_key_among_forward_transforms() -> None:
    """A loop of one's own under a key and a mask: gradients come back to C1 with the weights."""
    model, other = tiny_llama(), tiny_llama()
    anatomy = gs.dissect(model)
    key = gs.PermutationKey(mlp_cols=[[[0, 3], [1, 5]], [[0, 9], [1, 2]]])
    batch = {"input_ids": torch.arange(16).reshape(2, 8)}
    batch["labels"] = batch["input_ids"]
    masked = anatomy.heads[0, :]
    with gs.applied(model, key, gs.mask(masked)):
        model(**batch).loss.backward()
    with key.applied(other), gs.applied(other, gs.mask(masked)):
        other(**batch).loss.backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) and one.grad is not None and two.grad is not None
        assert torch.equal(one.grad, two.grad)
        assert not one.grad[masked.of(name).mask()].any()
    with key.applied(model), pytest.raises(KeyStateError), gs.applied(model, key):
        pass
