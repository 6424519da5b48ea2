"""Next-token cross-entropy, the default loss of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gradsurgery.errors import BatchError
from gradsurgery.losses.cross_entropy import IGNORED, cross_entropy_op


def shifted_labels(batch: Mapping[str, Any]) -> Tensor:
    """The token that each position predicts, ``[batch, token]``, ``-100`` where none counts.

    ``labels`` where the batch has them, else ``input_ids`` without what ``attention_mask`` leaves out.
    """
    labels = batch.get("labels")
    if labels is None:
        if "input_ids" not in batch:
            raise BatchError(f"causal_lm needs labels or input_ids; the batch has {', '.join(batch) or 'nothing'}.")
        labels = batch["input_ids"]
        if (kept := batch.get("attention_mask")) is not None:
            labels = labels.masked_fill(kept == 0, IGNORED)
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def count_tokens(batch: Mapping[str, Any]) -> Tensor:
    """How many tokens of a batch the loss is a mean over."""
    return (shifted_labels(batch) != IGNORED).sum()


def causal_lm(outputs: Any, batch: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
    """Mean cross-entropy of the next token, in nats, over all labelled positions; in fp32, block by block.

    Args:
        outputs: Model outputs with ``logits`` ``[batch, token, vocabulary]``.
        batch: ``labels`` ``[batch, token]`` (``-100`` is ignored) or ``input_ids`` with ``attention_mask``.
        refs: Not used.

    Raises:
        BatchError: neither labels nor input ids, or labels of another shape than the logits.
    """
    logits: Tensor = outputs.logits
    targets = shifted_labels(batch).to(logits.device)
    if targets.shape != logits.shape[:-1]:
        raise BatchError(
            f"causal_lm: labels {list(targets.shape)} do not fit logits {list(logits.shape)}, which are [batch, token, "
            f"vocabulary]."
        )
    total, _ = cross_entropy_op(logits, targets, 0)
    return total / (targets != IGNORED).sum().clamp(min=1)
