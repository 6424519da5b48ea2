"""Which weights an estimator speaks of, and the modules that multiply their inputs by them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import Names, select_names
from gradsurgery.anatomy.space import ParameterSpace, require_same_space, require_unpacked
from gradsurgery.errors import SelectionError
from gradsurgery.estimators.matrices import Layout, experts_of, layout_of


@dataclass
class Target:
    """A weight and its owners.

    Attributes:
        name: Canonical name of the parameter.
        layout: How it is a matrix; ``None`` for fused experts, whose layout shows when they are called.
        owners: ``(path, module)`` of every module that holds it.
    """

    name: str
    layout: Layout | None
    owners: list[tuple[str, nn.Module]] = field(default_factory=list)


def targets_of(model: nn.Module, modules: Names | Region, what: str) -> list[Target]:
    """The weights that a selection names, in the model's order.

    Args:
        model: The unwrapped model.
        modules: ``"all-linear"`` (every linear layer, Conv1D, convolution and fused expert but the output head), names
            as in `gs.region`, or a region of whole weights. Biases and norms that a name brings along are no matrices
            and are left out.
        what: Who asks, for messages.

    Raises:
        SelectionError: nothing found, part of a weight, or a matrix that is no known layer's (it is named).
        PlanError: a quantised weight.
    """
    space = ParameterSpace.of(model)
    known = _known(model, space)
    chosen = _chosen(model, space, modules, known)
    require_unpacked(space, chosen, what)
    if strange := [name for name in chosen if name not in known and len(space.shapes[name]) > 1]:
        raise SelectionError(
            f"{what}: {', '.join(strange[:3])} is no weight of a linear layer, Conv1D, convolution or fused experts, "
            f"so its input is not known; leave it out (gs.region(model, …, exclude=…))."
        )
    found = [known[name] for name in chosen if name in known]
    if not found:
        raise SelectionError(f"{what}: {modules!r} names no weight of a linear layer, Conv1D, convolution or experts.")
    return found


def _chosen(model: nn.Module, space: ParameterSpace, modules: Names | Region, known: dict[str, Target]) -> list[str]:
    if isinstance(modules, Region):
        require_same_space(modules.space, space, "the region of modules")
        for name, entries in modules.entries.items():
            if not entries.whole:
                raise SelectionError(f"a basis is of whole weights, and the region holds a part of {name}.")
        return list(modules.entries)
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    inside = [name for name, target in known.items() if all(owner is not head for _, owner in target.owners)]
    return list(select_names(space, modules, linear=inside).entries)


def _known(model: nn.Module, space: ParameterSpace) -> dict[str, Target]:
    """Every weight with a known layout, and every fused expert's."""
    out: dict[str, Target] = {}
    for path, module in model.named_modules():
        experts = experts_of(module)
        for own, _ in module.named_parameters(recurse=False):
            layout = layout_of(module, own)
            if layout is not None or own in experts:
                name = space.canonical(f"{path}.{own}" if path else own)
                out.setdefault(name, Target(name, layout)).owners.append((path, module))
    return {name: out[name] for name in space.shapes if name in out}
