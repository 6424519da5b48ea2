import math

import pytest
import torch
from torch import nn

from gradsurgery.errors import DataError
from gradsurgery.evaluation import relative_grad_norms
from gradsurgery.evaluation.grad_norms import Entries


def linear():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
        model.bias.zero_()
    return model


def total(model, batch):
    return model(batch["x"]).sum()


ROW = torch.tensor([[True, True], [False, False]])
COLUMN = torch.tensor([[True, False], [True, False]])


def test_by_hand():
    """loss = sum(W x): dW = (x, x). x = (1, 2): |g| of row 0 is sqrt(5), |theta| is 5; column 0: sqrt(2) / sqrt(45)."""
    groups: dict[str, Entries] = {
        "row": {"weight": ROW},
        "column": {"weight": COLUMN},
        "all": {"weight": None, "bias": None},
    }
    batches = {"some": [{"x": torch.tensor([[1.0, 2.0]])}, {"x": torch.tensor([[2.0, 4.0]])}], "none": []}
    norms = relative_grad_norms(linear(), groups, batches, total)
    assert norms["row"]["some"] == pytest.approx([math.sqrt(5) / 5, 2 * math.sqrt(5) / 5])
    assert norms["column"]["some"] == pytest.approx([math.sqrt(2 / 45), math.sqrt(8 / 45)])
    assert norms["all"]["some"][0] == pytest.approx(math.sqrt((10 + 2) / 125))
    assert norms["row"]["none"] == []


def test_gradients_and_values_are_left_alone():
    model = linear()
    model.weight.grad = torch.full((2, 2), 7.0)
    relative_grad_norms(model, {"row": {"weight": ROW}}, {"x": [{"x": torch.ones(1, 2)}]}, total)
    assert torch.equal(model.weight.grad, torch.full((2, 2), 7.0))
    assert model.bias.grad is None


def test_no_overflow_and_no_leak_from_outside_the_mask():
    model = linear()
    batch = {"x": torch.tensor([[1e-25, float("inf")]])}
    norms = relative_grad_norms(model, {"first": {"weight": COLUMN}}, {"x": [batch]}, lambda m, b: total(m, b))
    assert norms["first"]["x"][0] == pytest.approx(math.sqrt(2 / 45) * 1e-25)


def test_parameters_the_loss_does_not_reach_have_norm_zero():
    first = linear()
    model = nn.Sequential(first, linear())
    norms = relative_grad_norms(
        model, {"last": {"1.weight": None}}, {"x": [{"x": torch.ones(1, 2)}]}, lambda m, b: first(b["x"]).sum()
    )
    assert norms["last"]["x"] == [0.0]


def test_a_language_model_needs_no_loss():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=12))
    ids = torch.randint(31, (2, 12))
    extra = {"input_ids": ids, "forget": torch.tensor([True, False]), "category": torch.tensor([0, 1])}
    norms = relative_grad_norms(model, {"mlp": {"transformer.h.0.mlp.c_fc.weight": None}}, {"en": [extra]})
    assert norms["mlp"]["en"][0] > 0


def test_refusals():
    model = linear()
    batches = {"x": [{"x": torch.ones(1, 2)}]}
    cases: list[tuple[Entries, str]] = [
        ({}, "names no parameter"),
        ({"weights": None}, "no parameter 'weights'"),
        ({"weight": torch.ones(2, 2)}, "is torch.float32, expected bool"),
        ({"bias": None}, "nothing but zeros"),
    ]
    for group, message in cases:
        with pytest.raises(DataError, match=message):
            relative_grad_norms(model, {"g": group}, batches, total)
    model.weight.requires_grad_(False)
    with pytest.raises(DataError, match="does not train"):
        relative_grad_norms(model, {"g": {"weight": None}}, batches, total)
