"""``gs.dissect``: the units of any Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradsurgery.anatomy.anatomy import Anatomy
from gradsurgery.anatomy.discover import discover
from gradsurgery.anatomy.space import ParameterSpace, unwrap


def dissect(model: nn.Module, inputs: Mapping[str, Any] | None = None, structural: Sequence[str] = ()) -> Anatomy:
    """Find the heads, KV groups, neurons and experts of ``model``, whatever its class.

    The gradient of one consumer column reaches exactly the producer rows of its unit; every group found is then
    verified by swapping and ablating units of a randomised copy. Costs about the same for 135M and 70B parameters,
    also on the ``meta`` device: large models are examined on a tiny twin. The model is not changed.

    Args:
        model: A Hugging Face model or any module; DDP and compiled wrappers are seen through.
        inputs: Keyword arguments of one forward, for models whose forward needs more than token ids or pixels.
        structural: Parameters or modules (globs) that may stay without units where discovery cannot explain them;
            without this, what it cannot explain is an error.

    Returns:
        The model's anatomy, indexable as ``anatomy.heads[layers, units]``.

    Raises:
        AnatomyError: a layout that cannot be explained; the message names the module.

    Example:
        >>> anatomy = gs.dissect(model)
        >>> forget = anatomy.heads[:, -1:] | anatomy.neurons[:, -16:]
        >>> forget.count
        34
    """
    model = unwrap(model)
    found = discover(model, inputs, structural)
    return Anatomy(ParameterSpace.of(model), found.groups, found.structural, found.seconds)
