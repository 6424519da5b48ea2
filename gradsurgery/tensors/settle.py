"""Before and after weights change in place: drop the copies of them that hosts keep."""

from __future__ import annotations

import torch
from torch import nn


def settle(base: nn.Module) -> None:
    """Make FSDP2 drop gathered weights, and autocast its casts: both would go on with the values from before."""
    reshard(base)
    torch.clear_autocast_cache()


def reshard(base: nn.Module) -> None:
    """Make FSDP2 drop gathered weights. A forward without a backward (an evaluation, one that failed) leaves those of
    the root behind: parameters' names then are of other tensors than the optimizer's."""
    for module in base.modules():
        if any(parent.__name__ == "FSDPModule" for parent in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def unreduced(base: nn.Module) -> bool:
    """Whether FSDP2 holds gradients that it has not reduced yet, which nothing outside of it sees."""
    for module in base.modules():
        if not any(parent.__name__ == "FSDPModule" for parent in type(module).__mro__):
            continue
        state = module._get_fsdp_state()  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # several since torch 2.11
        for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
            whole = getattr(parameter, "_unsharded_param", None)
            if parameter.unsharded_accumulated_grad is not None or getattr(whole, "grad", None) is not None:
                return True
    return False
