"""The parameter space of a model: names, aliases of tied weights, shapes, and a fingerprint of all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from gradsurgery.anatomy.quantised import Quantised, quantised, shape_of
from gradsurgery.errors import PlanError, SelectionError


def unwrap(model: nn.Module) -> nn.Module:
    """The module that owns the parameter names: without DDP, Fabric and ``torch.compile`` around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            is_wrapper = type(model).__name__ in ("DistributedDataParallel", "DataParallel", "_FabricModule")
            inner = model.module if is_wrapper else None  # type: ignore[assignment]
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was written: ``fully_shard`` puts one of its own in front of it."""
    return next(c for c in type(module).__mro__ if not any(b.__name__ == "FSDPModule" for b in c.__mro__))


@dataclass(frozen=True)
class ParameterSpace:
    """Names and shapes of a model's parameters.

    Attributes:
        model: Name of the model's class.
        shapes: Shape by canonical name: the first of a tied weight's names, in ``named_parameters()`` order.
        aliases: Canonical name by every other name of a tied weight.
        layout: The configuration's numbers of heads, groups and experts: what shapes alone do not show.
        quantised: How packed weights are stored, by name. Shapes are those before packing, so a quantised model has the
            fingerprint of the model that it was made from.
    """

    model: str
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    layout: dict[str, int] = field(default_factory=dict)
    quantised: dict[str, Quantised] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> ParameterSpace:
        model = unwrap(model)
        first: dict[int, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        aliases: dict[str, str] = {}
        stored: dict[str, Quantised] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                aliases[name] = first[id(parameter)]
            else:
                first[id(parameter)] = name
                shapes[name] = shape_of(parameter)
                if (how := quantised(parameter)) is not None:
                    stored[name] = how
        return cls(own_class(model).__name__, shapes, aliases, layout_of(getattr(model, "config", None)), stored)

    def canonical(self, name: str) -> str:
        """The canonical name of a parameter; raises ``SelectionError`` for names the model does not have."""
        name = self.aliases.get(name, name)
        if name not in self.shapes:
            raise SelectionError(f"{self.model} has no parameter {name!r}. Print the anatomy for the names it has.")
        return name

    def numel(self) -> int:
        total = 0
        for shape in self.shapes.values():
            count = 1
            for n in shape:
                count *= n
            total += count
        return total

    @property
    def fingerprint(self) -> str:
        """16 hex digits of class, names, shapes and ties: equal for two models iff regions of one fit the other."""
        text = json.dumps([self.model, self.shapes, self.aliases, self.layout], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, other: ParameterSpace) -> str:
        """One phrase that says how two spaces differ; empty if they do not."""
        if self.model != other.model:
            return f"made for {self.model}, used with {other.model}"
        for name in [*self.shapes, *other.shapes]:
            mine, theirs = self.shapes.get(name), other.shapes.get(name)
            if mine != theirs:
                there, here = (list(shape) if shape is not None else "absent" for shape in (mine, theirs))
                return f"{name} is {there} there and {here} here"
        for name in [*self.layout, *other.layout]:
            if self.layout.get(name) != other.layout.get(name):
                return f"{name} is {self.layout.get(name)} there and {other.layout.get(name)} here"
        return "other weights are tied" if self.aliases != other.aliases else ""


def layout_of(config: object, prefix: str = "") -> dict[str, int]:
    """Whole numbers of a configuration (and of those inside it) that speak of heads, groups or experts."""
    found: dict[str, int] = {}
    for name, value in sorted(getattr(config, "__dict__", {}).items()):
        if type(value) is int and any(part in name for part in ("head", "group", "expert")):
            found[prefix + name] = value
        elif type(value).__name__.endswith("Config"):
            found |= layout_of(value, f"{prefix}{name}.")
    return found


def require_unpacked(space: ParameterSpace, names: Iterable[str], what: str) -> None:
    """Refuse to write into quantised weights.

    Raises:
        PlanError: one of the parameters is quantised.
    """
    for name in names:
        if (how := space.quantised.get(space.canonical(name))) is not None:
            raise PlanError(
                f"{what}: {name} is quantised ({how.scheme}), and parts of packed weights cannot be written. Do it "
                "before quantising, or after model.dequantize()."
            )


def require_same_space(made_for: ParameterSpace, model: ParameterSpace, what: str) -> None:
    """Raise ``SelectionError`` unless ``what``, made for one parameter space, is used with the same."""
    if made_for is not model and (gap := made_for.difference(model)):
        raise SelectionError(f"{what} belongs to another model: {gap}. Dissect the model you use it with.")
