"""A tiny twin: the same class from a shrunken config, for models that are too large (or not there) to probe."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gradsurgery.anatomy.adapters import LARGEST_RANK
from gradsurgery.anatomy.quantised import shape_of
from gradsurgery.errors import AnatomyError

from .build import built, config_of_class
from .names import kinds_of
from .replica import prepare
from .shrink import shrunken

MOST_PARAMETERS = 3_000_000
WIDEST = 1024


def needs_twin(model: nn.Module) -> bool:
    """Whether a model is too large to be probed itself and can be built at a smaller size."""
    if config_of_class(model) is None:
        return False
    return sum(math.prod(shape_of(p)) for p in model.parameters()) > MOST_PARAMETERS


def configs_of(model: nn.Module) -> list[Any]:
    """The configs of the twins of a model; see ``shrunken`` for their steps.

    Raises:
        AnatomyError: The config cannot be made smaller.
    """
    kinds = kinds_of(model)
    try:
        return [shrunken(config_of_class(model), step, kinds) for step in (0, 1, 2)]
    except Exception as error:
        raise _failed(model, error) from error


def twin_of(model: nn.Module, config: Any) -> nn.Module:
    """A prepared twin of ``model`` with a smaller config.

    Raises:
        AnatomyError: The class cannot be built from it.
    """
    try:
        return prepare(built(model, config, LARGEST_RANK))
    except Exception as error:
        raise _failed(model, error) from error


def _failed(model: nn.Module, error: Exception) -> AnatomyError:
    return AnatomyError(
        f"{type(model).__name__} cannot be built at small size ({type(error).__name__}: {error}). Dissect it "
        "with its weights loaded: then it is examined itself."
    )
