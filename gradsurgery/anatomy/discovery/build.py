"""Models built anew from their class and a config: for models without values, and for tiny twins."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gradsurgery.anatomy.adapters import adapted_like, base_of
from gradsurgery.anatomy.space import own_class
from gradsurgery.errors import AnatomyError

from .names import shapes_of


def config_of_class(model: nn.Module) -> Any:
    """The Hugging Face config of a model, ``None`` for modules that have none."""
    config = getattr(base_of(model), "config", None)
    return config if hasattr(config, "to_dict") else None


def built(model: nn.Module, config: Any, largest_rank: int | None = None) -> nn.Module:
    """An instance of the class of ``model`` with another config, on the CPU: unsharded, unquantised, adapters alike."""
    with torch.device("cpu"):
        return adapted_like(model, own_class(base_of(model))(config), largest_rank)


def same_again(model: nn.Module) -> nn.Module:
    """A model of the same class and config with fresh values, for models that have none.

    Raises:
        AnatomyError: There is no config, or it does not describe the model.
    """
    config = config_of_class(model)
    if config is None:
        raise AnatomyError(
            f"{type(model).__name__} has no Hugging Face config to build a copy from, and its weights are on the meta "
            "device: give the model weights first."
        )
    try:
        fresh = built(model, copy.deepcopy(config))
    except Exception as error:
        raise AnatomyError(
            f"{type(model).__name__} cannot be built from its config ({type(error).__name__}: {error}), and its "
            "weights are on the meta device: give the model weights first."
        ) from error
    ours, theirs = shapes_of(model), shapes_of(fresh)
    other = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
    if other is not None:
        raise AnatomyError(
            f"{type(model).__name__} is not what its config describes ({other} differs), and its weights are on the "
            "meta device: give the model weights first."
        )
    return fresh
