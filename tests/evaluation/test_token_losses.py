"""Token losses are what the mean is made of; densities are densities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.errors import DataError
from gradsurgery.evaluation import density, evaluate, token_losses
from tests.surgery.tiny import VOCABULARY, build


def test_the_mean_is_what_evaluate_reports_and_each_loss_is_its_tokens():
    model = build("llama")
    ids = torch.randint(3, VOCABULARY, (5, 7))
    ids[3, 4:] = -100
    found = token_losses(model, {"a": ids, "b": ids[:2]}, batch_size=2)
    for name, score in evaluate(model, {"a": ids, "b": ids[:2]}, batch_size=2).items():
        assert len(found[name]) == score["tokens"]
        assert found[name].double().mean().item() == pytest.approx(score["loss"], rel=1e-6)
    assert model.training
    with torch.no_grad():
        by_hand = -model.eval()(input_ids=ids[:1]).logits[0, 2].log_softmax(-1)[ids[0, 3]]
    assert found["a"][2].item() == pytest.approx(by_hand.item(), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=30), h=st.floats(0.05, 2))
def test_density_is_the_sum_of_its_kernels_and_integrates_to_one(values, h):
    at = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    found = density(values, at, bandwidth=h)
    oracle = sum(torch.distributions.Normal(v, h).log_prob(at).exp() for v in torch.tensor(values).double()) / len(
        values
    )
    torch.testing.assert_close(found, oracle)
    assert found.sum().item() * 0.01 == pytest.approx(1, abs=1e-3)


def test_bandwidth_of_silverman_by_hand():
    """Values 0 to 7: std = sqrt(21 / 4), quartiles (third from each end) 2 and 5."""
    h = 0.9 * min((21 / 4) ** 0.5, 3 / 1.34) * 8**-0.2
    values = [float(k) for k in range(8)]
    torch.testing.assert_close(density(values, [1.0]), density(values, [1.0], bandwidth=h))


def test_refusals():
    with pytest.raises(DataError, match="nothing to predict"):
        token_losses(build("llama"), {"a": torch.zeros(2, 1, dtype=torch.long)})
    with pytest.raises(DataError, match="batch_size=0"):
        token_losses(build("llama"), {}, batch_size=0)
    with pytest.raises(DataError, match="at least one"):
        density([], [0.0])
    with pytest.raises(DataError, match="all equal"):
        density([1.0, 1.0], [0.0])
