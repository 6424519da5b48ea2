"""The loss that the model itself computes from ``labels``: masked and seq2seq models, classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradsurgery.errors import BatchError


def model_loss(outputs: Any, batch: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
    """``outputs.loss``; the batch's ``labels`` are handed to the model.

    Raises:
        BatchError: the model returned no loss.
    """
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise BatchError("model_loss: the model returned no loss; give the batch the labels its class expects.")
    return loss


model_loss.takes_labels = True  # type: ignore[attr-defined]
