"""Losses of passes: ``loss(outputs, batch, refs) -> scalar``, a mean over its tokens; and what they compare with."""

from gradsurgery.losses.activations import Activations, activation_mse, activations
from gradsurgery.losses.causal_lm import causal_lm
from gradsurgery.losses.kl import KLDivergence, kl, kl_divergence
from gradsurgery.losses.model_loss import model_loss
from gradsurgery.losses.npo import NPO, npo
from gradsurgery.losses.references.adapters import AdaptersOff, adapters_off
from gradsurgery.losses.references.base import Reference
from gradsurgery.losses.references.cached import Cached, cached
from gradsurgery.losses.references.frozen import Frozen, frozen
from gradsurgery.losses.references.precompute import precompute
from gradsurgery.losses.references.snapshot import Snapshot, snapshot
from gradsurgery.losses.top_k import TopK

__all__ = [
    "NPO",
    "Activations",
    "AdaptersOff",
    "Cached",
    "Frozen",
    "KLDivergence",
    "Reference",
    "Snapshot",
    "TopK",
    "activation_mse",
    "activations",
    "adapters_off",
    "cached",
    "causal_lm",
    "frozen",
    "kl",
    "kl_divergence",
    "model_loss",
    "npo",
    "precompute",
    "snapshot",
]
