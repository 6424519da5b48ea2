"""References, ``reference(model, inputs)``: what a loss compares the model with, evaluated before its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import BatchError


class Reference:
    """Logits (or log-probabilities) that the model is held to.

    Attributes:
        columns: Columns of the batch that the reference reads and the model does not take.
    """

    columns: tuple[str, ...] = ()

    @property
    def source(self) -> Reference:
        """The reference that is taken at attach and saved: this one, or what it shares with others."""
        return self

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Evaluate on model inputs, in eval mode and without a graph."""
        raise NotImplementedError

    def take(self, model: nn.Module) -> None:
        """Remember what the reference needs of the model as it is now; for most that is nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to have the same reference, tensors alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave."""

    def describe(self) -> str:
        return f"{type(self).__name__}()"


class ReadOnce(dict[str, Any]):
    """What the references of a pass gave, for a loss with one backward: what it keeps of them may go with that."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode and no graph is built.

    Autocast keeps low-precision copies of weights for as long as it lasts, without a graph if they were made in here,
    of other values if weights are swapped: it forgets them on both ways through.
    """
    base = unwrap(model)
    modes = {module: module.training for module in base.modules()}
    torch.clear_autocast_cache()
    try:
        base.eval()
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()
        for module, training in modes.items():  # train() would wake modules that are in eval by themselves
            module.training = training


def forward_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The logits of a plain forward.

    Raises:
        BatchError: the outputs have none.
    """
    with evaluating(model):
        outputs = model(**inputs)
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise BatchError(f"a reference needs logits; the outputs of {type(unwrap(model)).__name__} have none.")
    return logits


def model_inputs(base: nn.Module, batch: Mapping[str, Any], decoder: bool) -> dict[str, Any]:
    """What of a batch the model takes; labels only where a decoder's input is made of them."""
    takes = inspect.signature(base.forward).parameters
    out = {name: value for name, value in batch.items() if name in takes and (decoder or name != "labels")}
    if "use_cache" in takes:
        out.setdefault("use_cache", False)
    return out
