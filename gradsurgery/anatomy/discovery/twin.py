"""A tiny twin: the same class from a shrunken config, for models that are too large (or not there) to probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradsurgery.errors import AnatomyError

from .replica import prepare
from .shrink import shrunken

MOST_PARAMETERS = 3_000_000
WIDEST = 1024


def needs_twin(model: nn.Module) -> bool:
    """Whether a model is too large to be probed itself, or holds no values."""
    parameters = list(model.parameters())
    if any(p.device.type == "meta" for p in parameters):
        return True
    if getattr(model, "config", None) is None or not hasattr(model.config, "to_dict"):
        return False
    return sum(p.numel() for p in parameters) > MOST_PARAMETERS


def twin_of(model: nn.Module, step: int = 0) -> nn.Module:
    """A prepared twin of ``model``; see ``shrunken`` for ``step``.

    Raises:
        AnatomyError: The class cannot be built from a smaller config.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise AnatomyError(
            f"{type(model).__name__} has no Hugging Face config to build a small twin from, and its weights are on "
            "the meta device: give the model weights first."
        )
    small = shrunken(config, step)
    try:
        with torch.device("cpu"):
            return prepare(type(model)(small))
    except Exception as error:
        raise AnatomyError(
            f"{type(model).__name__} cannot be built at small size ({type(error).__name__}: {error}). Dissect it "
            "with its weights loaded: then it is examined itself."
        ) from error
