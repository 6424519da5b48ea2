"""Negative preference optimization: unlearning that slows down where the model has left the reference.

Zhang et al. 2024, "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", arXiv
2404.05868, equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradsurgery.errors import BatchError, PlanError
from gradsurgery.losses.causal_lm import shifted_labels
from gradsurgery.losses.cross_entropy import IGNORED, cross_entropy_op
from gradsurgery.losses.kl import logits_of, require_fit
from gradsurgery.losses.top_k import TopK


@dataclass(frozen=True)
class NPO:
    """``(2 / beta) * mean log(1 + (p / p_ref) ** beta)`` over sequences; made by `npo`."""

    beta: float = 0.1
    reference: str = "reference"

    def __post_init__(self) -> None:
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not 0 < self.beta < math.inf:
            raise PlanError(f"npo: beta is a positive number, not {self.beta!r}; gradient ascent is its limit at 0.")

    @property
    def __name__(self) -> str:
        return f"npo({self.beta})" if self.reference == "reference" else f"npo({self.beta}, {self.reference!r})"

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Sequences that the loss is a mean over: those with a token that counts."""
        return (targets_of(batch) != IGNORED).any(-1).sum()

    def __call__(self, outputs: Any, batch: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
        logits = logits_of(outputs, "the model's outputs")
        given = refs.get(self.reference)
        if given is None or isinstance(given, TopK):
            have = "only its likeliest words" if given is not None else f"{', '.join(refs) or 'no reference'}"
            raise BatchError(
                f"npo needs the probability of every label under refs={{{self.reference!r}: …}}, given is {have}: "
                f"gs.losses.frozen(model), snapshot(region), adapters_off(), or cached(path) made without top_k."
            )
        reference = logits_of(given, f"the reference {self.reference!r}").detach().to(logits.device)
        require_fit(logits, reference)
        targets = targets_of(batch).to(logits.device)
        if targets.shape != logits.shape[:-1]:
            raise BatchError(f"npo: labels {list(targets.shape)} do not fit logits {list(logits.shape)}.")
        ratio = sequence_log_probs(logits, targets) - sequence_log_probs(reference, targets)
        counted = (targets != IGNORED).any(-1)
        # -logsigmoid, not softplus: torch's softplus is linear from 20 on, in every dtype
        each = (-2 / self.beta * F.logsigmoid(-self.beta * ratio)).masked_fill(~counted, 0.0)
        return each.sum() / counted.sum().clamp(min=1)


def targets_of(batch: Mapping[str, Any]) -> Tensor:
    """The token that each position predicts, ``-100`` where none counts, or where padding would have to predict it."""
    targets, attended = shifted_labels(batch), batch.get("attention_mask")
    if isinstance(attended, Tensor) and attended.shape == targets.shape:
        targets = targets.masked_fill(attended.to(targets.device) == 0, IGNORED)
    return targets


def sequence_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of every sequence, ``[batch]``: the sum over its positions whose target is not ``-100``.

    Example:
        >>> from gradsurgery.losses.npo import sequence_log_probs
        >>> sequence_log_probs(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).exp()
        tensor([0.2500])
    """
    rows = zip(logits.unbind(0), targets.unbind(0), strict=True)
    return -torch.stack([cross_entropy_op(x_TV, t_T, 0)[0] for x_TV, t_T in rows])


def npo(beta: float = 0.1, reference: str = "reference") -> NPO:
    """Negative preference optimization: makes the labelled sequences less likely than they are under a reference.

    ``(2 / beta) * mean log(1 + (p / p_ref) ** beta)`` over the sequences of a batch, with p the probability of a
    sequence's labels. Its gradient is that of gradient ascent times ``2 (p / p_ref)^beta / (1 + (p / p_ref)^beta)``: 1
    where model and reference agree, and towards 0 as a sequence is forgotten.

    The loss reads the batch as `causal_lm` does (a token that only padding predicts does not count) and is a mean over
    sequences with labels, not over tokens; ``surgery.count_items`` counts them.

    Args:
        beta: How soon it slows down; 0.1 in the paper.
        reference: Name in ``refs``: logits, outputs with ``logits``, or log-probabilities of the whole vocabulary.

    Raises:
        PlanError: ``beta`` is not positive.
        BatchError: (when it is used) no reference, a top-k one, another vocabulary or positions that differ.

    Example:
        >>> out = model(**batch)
        >>> loss = gs.losses.npo(beta=0.1)(out, batch, {"reference": out.logits})
        >>> round(loss.item(), 4)                           # 2 / beta * log 2, where nothing is forgotten yet
        13.8629
    """
    return NPO(beta, reference)
