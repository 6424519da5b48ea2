"""Loss and perplexity of a language model on each category's held-back sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from gradsurgery.evaluation.token_losses import token_losses


class Score(TypedDict):
    """``loss`` in nats per token, ``perplexity`` = exp(loss), ``tokens`` predicted."""

    loss: float
    perplexity: float
    tokens: int


def evaluate(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> dict[str, Score]:
    """Mean next-token loss over all tokens of each category, weighted over tokens, not over batches.

    Runs in eval mode, with logits in fp32 and sums in fp64, and leaves the model's modes as they were.

    Args:
        model: A causal language model: ``model(input_ids=…, use_cache=False).logits``.
        sequences: Category -> token ids ``[sequences, length]``; entries below 0 (padding, -100) are not counted.
        batch_size: Sequences in one forward.
        device: Where the batches go; by default where the model's first parameter is.

    Raises:
        DataError: a category holds nothing to predict.
    """
    found = token_losses(model, sequences, batch_size, device)
    return {category: _score(losses) for category, losses in found.items()}


def _score(losses: Tensor) -> Score:
    loss = losses.double().mean().item()
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": losses.numel()}
