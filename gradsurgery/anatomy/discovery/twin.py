"""A tiny twin: the same class from a shrunken config, for models that are too large (or not there) to probe."""

from __future__ import annotations

import math

from torch import nn

from gradsurgery.anatomy.adapters import LARGEST_RANK
from gradsurgery.anatomy.quantised import shape_of
from gradsurgery.errors import AnatomyError

from .build import built, config_of_class
from .replica import prepare
from .shrink import shrunken

MOST_PARAMETERS = 3_000_000
WIDEST = 1024


def needs_twin(model: nn.Module) -> bool:
    """Whether a model is too large to be probed itself and can be built at a smaller size."""
    if config_of_class(model) is None:
        return False
    return sum(math.prod(shape_of(p)) for p in model.parameters()) > MOST_PARAMETERS


def twin_of(model: nn.Module, step: int = 0) -> nn.Module:
    """A prepared twin of ``model``; see ``shrunken`` for ``step``.

    Raises:
        AnatomyError: The class cannot be built from a smaller config.
    """
    try:
        return prepare(built(model, shrunken(config_of_class(model), step), LARGEST_RANK))
    except Exception as error:
        raise AnatomyError(
            f"{type(model).__name__} cannot be built at small size ({type(error).__name__}: {error}). Dissect it "
            "with its weights loaded: then it is examined itself."
        ) from error
