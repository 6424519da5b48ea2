"""Loss and perplexity of a language model on each category's held-back sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradsurgery.errors import DataError
from gradsurgery.evaluation.modes import evaluating


class Score(TypedDict):
    """``loss`` in nats per token, ``perplexity`` = exp(loss), ``tokens`` predicted."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
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
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is no number of sequences: give 1 or more.")
    device = device or next(model.parameters()).device
    with evaluating(model):
        return {category: _score(model, category, ids, batch_size, device) for category, ids in sequences.items()}


def _score(model: nn.Module, category: str, sequences: Tensor, batch_size: int, device: torch.device | str) -> Score:
    if sequences.ndim != 2 or not (sequences[:, 1:] >= 0).any():
        raise DataError(f"category {category!r} holds nothing to predict: expected token ids [sequences, length >= 2].")
    total, tokens = 0.0, 0
    for chunk in torch.split(sequences, batch_size):
        batch = chunk.to(device).long()
        real = batch >= 0
        mask = {} if real.all() else {"attention_mask": real.long()}
        logits = model(input_ids=batch.clamp(min=0), use_cache=False, **mask).logits[:, :-1].float()
        targets = batch[:, 1:].masked_fill(~real[:, 1:], -100)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        total += losses.double().sum().item()
        tokens += int((targets >= 0).sum())
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}
