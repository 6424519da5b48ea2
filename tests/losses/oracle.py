"""KL divergence as one would write it down: float64, every softmax of [batch, token, vocabulary] in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import gradsurgery as gs


def kl(
    logits: Tensor, reference: Tensor, mask: Tensor | None, temperature: float = 1.0, reverse: bool = False
) -> Tensor:
    """Mean over the positions of the mask; impossible words contribute nothing."""
    log_q = (logits.double() / temperature).log_softmax(-1)
    log_p = (reference.double() / temperature).log_softmax(-1)
    return mean(divergence(log_q, log_p) if reverse else divergence(log_p, log_q), mask)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    impossible = log_p == -torch.inf
    log_p, log_q = log_p.masked_fill(impossible, 0.0), log_q.masked_fill(impossible, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(impossible, 0.0).sum(-1)


def mean(by_position: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return by_position.mean()
    return by_position[mask != 0].sum() / max(int((mask != 0).sum()), 1)


def merged(log_probs: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities of the indexed words, and of all others together."""
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, indices), rest], -1)


def ours(logits: Tensor, reference: Any, mask: Tensor | None = None, **options: Any) -> Tensor:
    batch = {} if mask is None else {"attention_mask": mask}
    return gs.losses.kl(**options)(SimpleNamespace(logits=logits), batch, {"reference": reference})


def gradient(loss: Any, logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, *args, **options)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad
