"""One forward of a replica: always from a clean state, in float64, and whatever goes wrong said in one sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradsurgery.errors import AnatomyError


def forward(model: nn.Module, fed: Mapping[str, Any], mode: TorchFunctionMode) -> list[Tensor]:
    """The floating-point outputs of ``model(**fed)`` under ``mode``.

    Raises:
        AnatomyError: the forward fails, or returns nothing to look at.
    """
    model.train().eval()  # some models keep tables made from their weights while in eval mode
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mode:
            output = model(**fed)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise AnatomyError(
            f"{type(model).__name__} does not run on inputs {sorted(fed)} in float64 ({type(error).__name__}: "
            f"{first}). "
            "Pass inputs its forward accepts: gs.dissect(model, inputs={name: value, …})."
        ) from error
    finally:
        torch.set_default_dtype(before)
    found = list(tensors_in(output))
    if not found:
        raise AnatomyError(
            f"{type(model).__name__} returns {type(output).__name__} without a floating-point tensor; units are "
            "recognised by what they change in the output. Dissect the part of the model that returns one."
        )
    return found


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output, however nested."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name))
