import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradsurgery.errors import DataError
from gradsurgery.evaluation import evaluate


class Fixed(nn.Module):
    """Gives the right next token (the input plus one, of 4) a chosen logit and the others 0."""

    def __init__(self, logit, dtype=torch.float32):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit, dtype=dtype))
        self.child = nn.Dropout(0.5)
        self.shapes = []

    def forward(self, input_ids, use_cache, attention_mask=None):
        self.shapes.append(tuple(input_ids.shape))
        assert not self.training and not torch.is_grad_enabled()
        logits = torch.zeros(*input_ids.shape, 4, dtype=self.logit.dtype)
        logits.scatter_(2, ((input_ids + 1) % 4)[..., None], self.logit.item())
        return SimpleNamespace(logits=logits)


def test_by_hand():
    """Logits (log 5, 0, 0, 0): the right token has probability 5/8, any other 1/8."""
    model = Fixed(math.log(5))
    scores = evaluate(
        model, {"right": torch.tensor([[0, 1, 2, 3]]), "half": torch.tensor([[0, 1, 1, 1], [1, 2, 3, 1]])}
    )
    assert scores["right"]["loss"] == pytest.approx(math.log(8 / 5), rel=1e-6)
    assert scores["right"]["perplexity"] == pytest.approx(1.6, rel=1e-6)
    assert scores["right"]["tokens"] == 3
    assert scores["half"]["tokens"] == 6
    assert scores["half"]["loss"] == pytest.approx((3 * math.log(8 / 5) + 3 * math.log(8)) / 6, rel=1e-6)


def test_weighted_over_tokens_not_batches():
    """One sequence with three right tokens, one with a single wrong one: weights 3 to 1 whatever the batch size."""
    model = Fixed(math.log(5))
    sequences = {"x": torch.tensor([[0, 1, 2, 3], [0, 0, -100, -100]])}
    expected = (3 * math.log(8 / 5) + math.log(8)) / 4
    for batch_size in (1, 2, 5):
        assert evaluate(model, sequences, batch_size)["x"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert model.shapes == [(1, 4), (1, 4), (2, 4), (2, 4)]


def test_half_precision_logits_are_summed_in_fp32():
    model = Fixed(2.0, torch.bfloat16)
    score = evaluate(model, {"x": torch.arange(4).repeat(1, 64)})["x"]
    assert score["loss"] == pytest.approx(math.log(1 + 3 * math.exp(-2)), rel=1e-6)


def test_modes_are_left_alone():
    model = Fixed(1.0).train()
    model.child.eval()
    evaluate(model, {"x": torch.tensor([[0, 1]])})
    assert model.training and not model.child.training
    with pytest.raises(DataError):
        evaluate(model, {"x": torch.tensor([[0]])})
    assert model.training and not model.child.training


def test_infinite_perplexity_is_no_crash():
    assert evaluate(Fixed(1e4), {"x": torch.tensor([[0, 0]])})["x"]["perplexity"] == math.inf


@pytest.mark.parametrize("ids", [torch.zeros(0, 4, dtype=torch.int64), torch.tensor([[1, -100]]), torch.tensor([1, 2])])
def test_nothing_to_predict(ids):
    with pytest.raises(DataError, match="category 'x' holds nothing to predict"):
        evaluate(Fixed(1.0), {"x": ids})


def test_a_stock_model_agrees_with_its_own_loss():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=12)).eval()
    ids = torch.randint(31, (5, 12))
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss.item()
    assert evaluate(model, {"x": ids.int()}, batch_size=2)["x"]["loss"] == pytest.approx(own, rel=1e-6)
