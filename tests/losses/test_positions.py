"""Which positions KL is a mean over, and that ``count`` says the same as the loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import BatchError
from tests.losses import oracle

IDS = torch.arange(12).view(3, 4)
PADDED = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
SHORT = torch.tensor([[5, 6], [7, -100], [-100, -100]])
count = gs.losses.kl_divergence.count  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": IDS}, 12),
        ({"input_ids": IDS, "attention_mask": PADDED}, 7),
        ({"input_ids": IDS, "attention_mask": PADDED.bool(), "labels": IDS}, 7),
        ({"inputs_embeds": torch.zeros(3, 4, 8)}, 12),
        ({"input_ids": IDS, "attention_mask": PADDED, "labels": SHORT}, 3),
        ({"input_ids": IDS, "decoder_input_ids": SHORT}, 6),
        ({"input_ids": IDS, "decoder_input_ids": SHORT, "labels": SHORT}, 3),
        ({"input_ids": IDS, "decoder_input_ids": SHORT, "decoder_attention_mask": SHORT != 5}, 5),
        ({"input_ids": IDS, "attention_mask": PADDED, "labels": torch.zeros(3).long()}, 3),
        ({"input_ids": IDS, "labels": torch.zeros(3, 7)}, 3),
        ({"pixel_values": torch.zeros(3, 2, 8, 8)}, 3),
    ],
)
def test_count(batch: dict[str, Tensor], expected: int) -> None:
    assert int(count(batch)) == expected


def test_count_of_a_named_mask() -> None:
    batch = {"input_ids": IDS, "attention_mask": PADDED, "labels": IDS.masked_fill(IDS > 6, -100)}
    assert int(gs.losses.kl(mask="labels").count(batch)) == 7
    assert int(gs.losses.kl(mask="completion_mask").count({**batch, "completion_mask": IDS < 3})) == 3
    with pytest.raises(BatchError, match="completion_mask"):
        gs.losses.kl(mask="completion_mask").count(batch)


def test_count_of_nothing() -> None:
    with pytest.raises(BatchError, match="nothing"):
        count({})


@pytest.fixture(scope="module")
def t5() -> Any:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("tokens", [3, 4])  # as long as the input, too: then only outputs and model tell
def test_encoder_decoder(t5: Any, tokens: int) -> None:
    labels = torch.full((3, tokens), 5)
    labels[1, 2:] = labels[2, 1:] = -100
    batch = {"input_ids": IDS, "attention_mask": PADDED, "labels": labels}
    outputs = t5(**batch, use_cache=False)
    reference = outputs.logits.detach() + torch.randn_like(outputs.logits)
    value = gs.losses.kl_divergence(outputs, batch, {"reference": reference})
    exact = oracle.kl(outputs.logits, reference, labels != -100)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-7)
    assert int(count(batch, t5)) == int((labels != -100).sum())
    if tokens == 3:
        assert int(count(batch)) == int((labels != -100).sum())


def test_micro_batches_add_up() -> None:
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 3, 4, 9)
    batch = {"input_ids": IDS, "attention_mask": PADDED}
    whole = gs.losses.kl_divergence(SimpleNamespace(logits=logits), batch, {"reference": reference})
    total = torch.zeros(())
    for part in (slice(0, 1), slice(1, 3)):
        cut = {name: value[part] for name, value in batch.items()}
        loss = gs.losses.kl_divergence(SimpleNamespace(logits=logits[part]), cut, {"reference": reference[part]})
        total += loss * count(cut) / count(batch)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
