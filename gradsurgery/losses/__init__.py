"""Losses of passes: ``loss(outputs, batch, refs) -> scalar``, a mean over its tokens."""

from gradsurgery.losses.causal_lm import causal_lm
from gradsurgery.losses.model_loss import model_loss

__all__ = ["causal_lm", "model_loss"]
