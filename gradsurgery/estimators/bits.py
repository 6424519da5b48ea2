"""Bool tensors at one bit an entry."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(mask: Tensor) -> Tensor:
    """A bool tensor as uint8, eight entries a byte."""
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `packed`."""
    count = 1
    for n in shape:
        count *= n
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.unsqueeze(-1) >> places & 1).bool().reshape(-1)[:count].reshape(shape)
