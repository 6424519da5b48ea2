"""Loss on held-back responses, and how far the model moved from a reference there, by category."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradsurgery.data.chat import IGNORED
from gradsurgery.data.chat_rows import ChatRows
from gradsurgery.errors import DataError
from gradsurgery.evaluation.modes import evaluating
from gradsurgery.losses.causal_lm import shifted_labels
from gradsurgery.losses.kl import KLDivergence
from gradsurgery.losses.references.base import Reference

TAKEN = "input_ids", "attention_mask"


class ResponseScore(TypedDict, total=False):
    """``loss`` and ``kl`` in nats per labelled token, ``tokens``: how many there are."""

    loss: float
    kl: float
    tokens: int


@torch.no_grad()
def score_responses(
    model: nn.Module, rows: ChatRows, reference: Reference | None = None, batch_size: int = 32
) -> dict[str, ResponseScore]:
    """Means over all labelled tokens of each category, in eval mode, with logits in fp32 and sums in fp64.

    ``kl`` is KL(reference ‖ model) of the next token, at the positions that a labelled token follows.

    Args:
        model: A causal language model.
        rows: Held-back rows.
        reference: Such as ``gs.losses.frozen(model)``; without one there is no ``kl``.
        batch_size: Rows in one forward.

    Raises:
        DataError: a category without labels.
        BatchError: a reference of another vocabulary.
    """
    with evaluating(model):
        return {name: _score(model, rows, name, reference, batch_size) for name in rows.categories}


def _score(model: nn.Module, rows: ChatRows, category: str, reference: Reference | None, size: int) -> ResponseScore:
    device = next(model.parameters()).device
    divergence = KLDivergence(mask="counted")
    loss = kl = 0.0
    tokens = 0
    for batch in rows.batches(category, size):
        inputs = {name: batch[name].to(device) for name in batch if name in TAKEN}
        targets = shifted_labels(batch).to(device)
        counted = targets != IGNORED
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[counted].float()
        loss += float(cross_entropy(logits, targets[counted], reduction="none").double().sum())
        found = int(counted.sum())
        if reference is not None and found:
            refs = {"reference": reference(model, inputs)}
            kl += float(divergence(outputs, {**inputs, "counted": counted}, refs)) * found
        tokens += found
    if not tokens:
        raise DataError(f"category {category!r} holds nothing to predict: no held-back row of it has a label.")
    out: ResponseScore = {"loss": loss / tokens, "tokens": tokens}
    if reference is not None:
        out["kl"] = kl / tokens
    return out
