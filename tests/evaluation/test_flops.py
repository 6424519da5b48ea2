import pytest

from gradsurgery.errors import DataError
from gradsurgery.evaluation import Throughput, model_flops, training_flops


def test_by_hand():
    assert training_flops(10, 7) == 420
    assert training_flops(10, 7, layers=2, width=3, context=5) == 7 * (60 + 12 * 2 * 3 * 5)
    with pytest.raises(DataError, match="tokens=-1 is negative"):
        training_flops(1, -1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_own_numbers(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    layer = 2 * 8 * 12 + 2 * 8 * 6 + 3 * 8 * 12 + 2 * 8  # q and o, k and v (one head of 6), MLP, two norms
    assert model_flops(model, 100, 16) == 100 * (6 * (2 * layer + 8 + 11 * 8) + 12 * 2 * 12 * 16)


def test_throughput(monkeypatch):
    clock = iter([10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Throughput()
    meter.add(30)
    meter.add(50)
    assert meter.per_second == 20
    meter.reset()
    assert meter.tokens == 0 and meter.seconds == 1
