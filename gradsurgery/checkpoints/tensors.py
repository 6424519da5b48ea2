"""The tensors of a checkpoint by name, as the ranks hold them: nothing is gathered, nothing copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from gradsurgery.checkpoints.ranks import rank
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.tensors import is_sharded

MODEL, OPTIMIZER = "model/", "optimizer/"
State = dict[str, dict[str, Any]]
"""By parameter and key, what is no tensor of its own: numbers, flags, nothing."""


def model_tensors(base: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; what is tied, once."""
    seen: set[int] = set()
    out = {}
    for name, value in base.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            out[f"{MODEL}{name}"] = value.detach()
    return out


def named(optimizer: torch.optim.Optimizer, base: nn.Module) -> dict[nn.Parameter, str]:
    """Names of an optimizer's parameters.

    Raises:
        PlanError: it steps parameters that are not the model's.
    """
    names = {p: name for name, p in base.named_parameters()}
    strangers = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise PlanError(
            f"{strangers} of the {type(optimizer).__name__}'s parameters are not the model's; give what they belong to "
            f"a place in the model, or save them yourself."
        )
    return names


def split_state(optimizer: torch.optim.Optimizer, base: nn.Module) -> tuple[dict[str, Tensor], State]:
    """An optimizer's state: its tensors, and its numbers (0-dimensional tensors are numbers with a dtype)."""
    tensors: dict[str, Tensor] = {}
    numbers: State = {}
    names = named(optimizer, base)
    for parameter, name in ((p, names[p]) for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                own = is_sharded(parameter) and not is_sharded(value)
                tensors[f"{OPTIMIZER}{name}/{key}" + (f"@{rank()}" if own else "")] = value.detach()
            else:
                numbers.setdefault(name, {})[key] = number(value, f"{type(optimizer).__name__} keeps {key!r} of {name}")
    return tensors, numbers


def number(value: Any, what: str) -> Any:
    """Something that JSON holds exactly."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PlanError(f"{what} as a {type(value).__name__}, which a checkpoint cannot hold.")


def place_for_state(
    optimizer: torch.optim.Optimizer, base: nn.Module, metadata: Metadata, numbers: State
) -> tuple[dict[str, Tensor], dict[nn.Parameter, dict[str, Any]]]:
    """Empty tensors for a stored state, laid out as this run's parameters are, and the state that they will make up.

    Raises:
        ArtefactError: the state is of other parameters, or a part of it belongs to ranks that this run has not.
    """
    names = named(optimizer, base)
    wanted = {name: p for p, name in names.items()}
    capturable = {p for g in optimizer.param_groups if g.get("capturable") or g.get("fused") for p in g["params"]}
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    tensors: dict[str, Tensor] = {}
    state: dict[nn.Parameter, dict[str, Any]] = {}
    for name, held in numbers.items():
        parameter = stepped_parameter(name, wanted, stepped)
        device = parameter.device if parameter in capturable else torch.device("cpu")
        for key, value in held.items():
            if isinstance(value, dict):
                value = torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]), device=device)
            state.setdefault(parameter, {})[key] = value
    for full, name, key, owner in stored(metadata):
        if owner not in (None, rank()):
            continue
        parameter = stepped_parameter(name, wanted, stepped)
        about: Any = metadata.state_dict_metadata[full]
        if owner is not None:
            tensors[full] = torch.empty(about.size, dtype=about.properties.dtype, device=parameter.device)
        elif about.size == parameter.shape:
            tensors[full] = torch.zeros_like(parameter.detach(), dtype=about.properties.dtype)
        else:
            tensors[full] = torch.empty(about.size, dtype=about.properties.dtype, device=parameter.device)
        state.setdefault(parameter, {})[key] = tensors[full]
    return tensors, state


def stored(metadata: Metadata) -> Iterator[tuple[str, str, str, int | None]]:
    """Full name, parameter, key and owning rank of every stored tensor of an optimizer."""
    for full in metadata.state_dict_metadata:
        if full.startswith(OPTIMIZER):
            name, _, key = full.removeprefix(OPTIMIZER).rpartition("/")
            key, _, owner = key.partition("@")
            yield full, name, key, int(owner) if owner else None


def stepped_parameter(name: str, wanted: dict[str, nn.Parameter], stepped: set[nn.Parameter]) -> nn.Parameter:
    if name not in wanted or wanted[name] not in stepped:
        raise ArtefactError(f"the checkpoint holds an optimizer's state of {name}, which this optimizer does not step.")
    return wanted[name]
