"""Where adapters go: linear layers by name, of exact types, or quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsurgery.anatomy.adapters import adapters_of
from gradsurgery.anatomy.quantised import quantised, shape_of
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import Names, region
from gradsurgery.anatomy.space import ParameterSpace, own_class, require_same_space
from gradsurgery.errors import SelectionError


@dataclass(frozen=True)
class Place:
    """A linear layer of a model.

    Attributes:
        path: Its path.
        module: The layer.
        inputs: Features that it reads.
        outputs: Features that it writes.
        quantised: How its weight is packed, if it is.
    """

    path: str
    module: nn.Module
    inputs: int
    outputs: int
    quantised: str | None

    @classmethod
    def of(cls, path: str, module: Any) -> Place:
        shape, packed = shape_of(module.weight), quantised(module.weight)
        outputs, inputs = shape[::-1] if own_class(module) is Conv1D else shape
        return cls(path, module, inputs, outputs, None if packed is None else packed.scheme)

    @property
    def weight_OI(self) -> Tensor:
        """The weight ``[out, in]``, a view."""
        weight: Any = self.module.weight
        return weight.T if own_class(self.module) is Conv1D else weight


def places_of(model: nn.Module, modules: Names | Region) -> list[Place]:
    """The linear layers that a selection names, in the model's order.

    Args:
        model: The unwrapped model.
        modules: As in `gs.region`, or a region. What it holds besides weights of linear layers and their biases is an
            error, but for norms and other vectors that a module's name brings along.

    Raises:
        SelectionError: nothing found, or a matrix of another kind of layer.
    """
    space = ParameterSpace.of(model)
    chosen = modules if isinstance(modules, Region) else region(model, modules)
    require_same_space(chosen.space, space, "adapters: modules")
    wanted, found, strange = set(chosen.entries), [], []
    inside = [path for path, module in model.named_modules() if adapters_of(module)]
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if space.canonical(f"{path}.{own}" if path else own) not in wanted:
                continue
            if own == "weight" and is_linear(module):
                if not (_everything(modules) and any(path.startswith(f"{p}.lora_") for p in inside)):
                    found.append(Place.of(path, module))
            elif len(shape_of(parameter)) > 1:
                strange.append(f"{path}.{own} ({type(module).__name__})")
    if strange:
        raise SelectionError(
            f"adapters: {', '.join(strange[:3])} is no weight of an nn.Linear or Conv1D, so nothing can be added to "
            f"what it computes; leave it out of modules=…"
        )
    if not found:
        raise SelectionError(f"adapters: {modules!r} names no nn.Linear or Conv1D of {type(model).__name__}.")
    return found


def is_linear(module: nn.Module) -> bool:
    """Exact ``nn.Linear`` and ``Conv1D``, and quantised layers in their place."""
    packed = isinstance(module, nn.Linear) and quantised(module.weight) is not None
    return packed or own_class(module) in (nn.Linear, Conv1D)


def _everything(modules: Names | Region) -> bool:
    return isinstance(modules, str) and modules == "all-linear"
