"""A copy of a model as plain modules with plain weights: neither sharded nor quantised, at full shape.

``deepcopy`` refuses what ``fully_shard`` made, and copies packed weights as they are. Here every module becomes an
empty one of the class that it was written as, and gets copies of its attributes, the parameters replaced.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.quantised import quantised, shape_of
from gradsurgery.anatomy.space import own_class
from gradsurgery.errors import AnatomyError
from gradsurgery.tensors import is_laid_out, is_sharded

_FSDP = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_plain(model: nn.Module) -> bool:
    """Whether ``deepcopy`` gives a copy that computes on weights of their full shape."""
    return not any(is_sharded(p) or quantised(p) is not None for p in model.parameters())


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU with unsharded, unquantised parameters; gathers one parameter after another.

    Raises:
        AnatomyError: A module computes on packed weights in a way of its own.
    """
    memo: dict[int, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        memo[id(module)] = _empty(module, path)
    with torch.no_grad():
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(_value(parameter))
    for module in model.modules():
        kept = {name: value for name, value in vars(module).items() if not name.startswith(_FSDP)}
        if is_laid_out(module):
            del kept["forward"]  # the class's own computes on whole weights
        for name in kept:
            if name.endswith("_hooks"):
                kept[name] = type(kept[name])()
        memo[id(module)].__dict__.update(copy.deepcopy(kept, memo))
    return memo[id(model)]


def _empty(module: nn.Module, path: str) -> nn.Module:
    """A module of the same class; of the stock class where its own one serves packed weights only."""
    kind = own_class(module)
    packed = [quantised(p) is not None for p in module.parameters(recurse=False)]
    if any(packed):
        stock = next((c for c in kind.__mro__ if c.__module__.startswith("torch.nn.modules.")), nn.Module)
        if stock is nn.Module:
            raise AnatomyError(
                f"{path} ({kind.__name__}) computes on quantised weights in a way of its own. Dissect the model "
                "before it is quantised."
            )
        kind = stock
    return kind.__new__(kind)


def _value(parameter: Tensor) -> Tensor:
    """The parameter at full shape; of a quantised one the shape alone, for discovery draws its own values."""
    if quantised(parameter) is not None:
        return torch.zeros(shape_of(parameter))
    data: Any = parameter.detach()
    return (data.full_tensor() if is_sharded(data) else data).cpu().clone()
