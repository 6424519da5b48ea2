"""From a pass's transforms to handlers of modules, checked against the model before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from gradsurgery.anatomy.space import ParameterSpace, own_class, require_same_space, unwrap
from gradsurgery.errors import PlanError, SelectionError
from gradsurgery.tensors import is_sharded, is_tensor_parallel
from gradsurgery.transforms.base import Effect, ForwardTransform, InputEffect, WeightEffect
from gradsurgery.transforms.engine.embedding import EmbeddingHandler
from gradsurgery.transforms.engine.handlers import Handler, LinearHandler, SwapHandler
from gradsurgery.transforms.engine.inputs import InputHandler
from gradsurgery.transforms.engine.parallel import ParallelLinearHandler
from gradsurgery.transforms.engine.program import build_program
from gradsurgery.transforms.engine.readers import read_instead_of_called, read_of_children
from gradsurgery.transforms.engine.rerun import RerunHandler
from gradsurgery.transforms.engine.styles import require_expressible, summed_apart

Owners = dict[str, list[tuple[str, str]]]
"""Canonical parameter name -> every ``(module path, attribute)`` that reads it."""


def owners_of(model: nn.Module, space: ParameterSpace) -> Owners:
    out: Owners = {name: [] for name in space.shapes}
    for path, module in model.named_modules(remove_duplicate=True):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            if parameter is not None:
                out[space.canonical(name)].append((path, attribute))
    return out


def reader_of(modules: Mapping[str, nn.Module], path: str, attribute: str) -> tuple[str, str]:
    """The module whose forward reads a parameter: its owner, or the outermost ancestor that does, by a dotted name.

    An ancestor's swapped parameter is also what the owner reads when it is called. Linear layers that the ancestor
    calls on some paths and reads on others, never both on one, stay their own (and cheap); should the path that runs
    not call them, ``Switchboard.check_called`` says so.
    """
    parts = path.split(".") if path else []
    for k in range(len(parts)):
        above, child = ".".join(parts[:k]), ".".join(parts[k:])
        parent: Any = own_class(modules[above])
        if (child, attribute) not in read_of_children(parent):
            continue
        if own_class(modules[path]) in (nn.Linear, Conv1D) and child in read_instead_of_called(parent):
            continue
        return above, f"{child}.{attribute}"
    return path, attribute


def is_tokens_first(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a module runs on ``[token, batch, …]``: in attention, a layer or an RNN with ``batch_first=False``."""
    parts = path.split(".") if path else []
    above = [modules[".".join(parts[:k])] for k in range(len(parts) + 1)]
    holders = [*above, *(getattr(module, "self_attn", None) for module in above)]
    return any(getattr(holder, "batch_first", None) is False for holder in holders)


class ForwardPlan:
    """What the forward transforms of one pass do, module by module.

    Args:
        model: The model, unwrapped.
        transforms: The pass's forward transforms.

    Raises:
        SelectionError: a region of another model, or one that holds no entry that trains.
        PlanError: a layer whose units or rows cannot be told apart.
    """

    def __init__(self, model: nn.Module, transforms: Sequence[ForwardTransform]) -> None:
        self.model = unwrap(model)
        self.space = ParameterSpace.of(self.model)
        self.transforms = tuple(transforms)
        parallel = is_tensor_parallel(self.model)
        if parallel:
            require_expressible(self.model)
        for transform in self.transforms:
            check_fits(transform, self.model, self.space)
        owners = owners_of(self.model, self.space)
        effects: dict[str, list[tuple[str, Effect]]] = {}
        modules = dict(self.model.named_modules())
        for transform in self.transforms:
            for effect in transform.effects():
                for path, attribute in owners[self.space.canonical(effect.name)]:
                    if isinstance(effect, WeightEffect):
                        path, attribute = reader_of(modules, path, attribute)
                    effects.setdefault(path, []).append((attribute, effect))
        for name in sorted(summed_apart(self.model)) if parallel else ():
            if name.rpartition(".")[0] in effects:
                raise PlanError(
                    f"{name} has a gradient on each rank of this tensor-parallel model that is of its own heads "
                    f"alone, summed by a hook on the parameter itself, which forward transforms would hide from it; "
                    f"leave it out of the region."
                )
        self.handlers = {path: build_handlers(modules[path], path, found, parallel) for path, found in effects.items()}
        self.tokens_first = frozenset(path for path in self.handlers if is_tokens_first(modules, path))

    @property
    def per_row(self) -> bool:
        return any(handler.program.per_row for handlers in self.handlers.values() for handler in handlers)


def check_fits(transform: ForwardTransform, model: nn.Module, space: ParameterSpace) -> None:
    """Raise unless a transform's regions are the model's and something of them trains."""
    for region in transform.regions():
        require_same_space(region.space, space, f"{transform.name}: region {region.text or 'given'}")
        trains = any(p.requires_grad and space.canonical(n) in region.entries for n, p in model.named_parameters())
        if not trains and transform.name in ("mask", "scale"):
            raise SelectionError(
                f"{transform.describe()} holds no entry that trains: every parameter it covers is frozen. "
                f"Unfreeze them, or choose a region among the parameters that train (an adapter's, say)."
            )


def build_handlers(
    module: nn.Module, path: str, effects: Iterable[tuple[str, Effect]], parallel: bool = False
) -> list[Handler]:
    """The handlers of one module, in the order in which they see its input.

    ``parallel``: ranks compute with what they hold of the weights.
    """
    effects = list(effects)
    is_linear = own_class(module) in (nn.Linear, Conv1D)
    program = build_program(path, effects, zeros_are_atoms=is_linear)
    cut = parallel and any(is_sharded(parameter) for parameter in module.parameters(recurse=False))
    if is_linear:
        return [ParallelLinearHandler(module, program) if cut else LinearHandler(module, program)]
    if isinstance(module, nn.Embedding) and not program.edits:
        whole_rows = all(box[0].whole for atoms in program.atoms.values() for atom in atoms for box in atom.boxes)
        if whole_rows or own_class(module) is nn.Embedding:
            return [EmbeddingHandler(module, program)]
    if cut:
        raise PlanError(
            f"{path} ({type(module).__name__}) computes in a way of its own with the parts of its weights that lie on "
            f"a rank; leave it out of the region, or of the tensor-parallel plan."
        )
    inputs = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and set(program.edits) == {"weight"}
    if inputs:
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
            raise PlanError(f"{path} is a grouped convolution: the channels that it reads cannot be edited as units.")
        edits = build_program(path, [e for e in effects if isinstance(e[1], InputEffect)])
        weights = [e for e in effects if not isinstance(e[1], InputEffect)]
        return [InputHandler(module, edits), *(build_handlers(module, path, weights) if weights else [])]
    if program.per_row or program.edits:
        return [RerunHandler(module, program)]
    return [SwapHandler(module, program)]
