"""A second model as the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.losses.references.base import Reference, forward_logits


class Frozen(Reference):
    """The logits of another model; made by `frozen`.

    Args:
        model: The reference model, on a device of its own if it likes. Its memory comes on top of the trained model's:
            `snapshot` keeps a region's worth.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise PlanError(f"frozen takes a model, not {type(model).__name__}.")
        self.model = model

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        self._require_other(model)
        parameter = next(unwrap(self.model).parameters(), None)
        if parameter is not None:
            inputs = {k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return forward_logits(self.model, inputs)

    def take(self, model: nn.Module) -> None:
        """Check that the reference is another model.

        Raises:
            PlanError: it is the trained model, or shares weights with it.
        """
        self._require_other(model)

    def _require_other(self, model: nn.Module) -> None:
        mine = {id(p) for p in unwrap(self.model).parameters() if p.requires_grad}
        if any(id(p) in mine for p in unwrap(model).parameters()):
            raise PlanError(
                "frozen(model): the reference shares weights that train with the model, and would move with it. Give "
                "it a copy, or use gs.losses.snapshot(region), which keeps a copy of what trains alone."
            )

    def describe(self) -> str:
        return f"frozen({type(unwrap(self.model)).__name__})"


def frozen(model: nn.Module) -> Frozen:
    """Another model's logits as the reference.

    Raises:
        PlanError: no model; when it is used, one that shares trained weights with the trained model.

    Example:
        >>> import copy
        >>> reference = gs.losses.frozen(copy.deepcopy(model))
        >>> reference(model, {"input_ids": batch["input_ids"]}).shape
        torch.Size([2, 8, 64])
    """
    return Frozen(model)
