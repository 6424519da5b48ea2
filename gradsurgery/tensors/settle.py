"""Before and after weights change in place: drop the copies of them that hosts keep."""

from __future__ import annotations

import torch
from torch import nn


def settle(base: nn.Module) -> None:
    """Make FSDP2 drop gathered weights, and autocast its casts: both would go on with the values from before."""
    for module in base.modules():
        if any(parent.__name__ == "FSDPModule" for parent in type(module).__mro__):
            module.reshard()  # type: ignore[operator]
    torch.clear_autocast_cache()
