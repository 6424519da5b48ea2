"""Gradients by example, read in one backward: a zero perturbation of every bottleneck, one a group of rows.

With ``y = B ((1 + c_b) ⊙ A x)`` for the rows of example b, ``dL/dc_b = Σ_t (A x_t) ⊙ (Bᵀ δ_t)`` is the gradient of the
gains of the bottleneck's coordinates from that example alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from gradsurgery.errors import BatchError

Grain = Literal["sequence", "token"]


class Probes:
    """The perturbations of one forward.

    Args:
        grain: One perturbation a sequence, or one a token.
        shape: ``(batch, tokens)``; by default that of the first bottleneck.
    """

    def __init__(self, grain: Grain = "sequence", shape: tuple[int, int] | None = None) -> None:
        self.grain, self.shape = grain, shape
        self.leaves: dict[str, Tensor] = {}

    def __call__(self, path: str, h: Tensor) -> Tensor:
        """``c ⊙ h`` with ``c = 0``, at the layer ``path``; the same perturbation when it is called again."""
        lead = tuple(h.shape[:-1])
        if self.shape is None:
            if len(lead) != 2:
                raise BatchError(f"{path} reads rows {list(lead)}, which do not tell examples apart.")
            self.shape = (lead[0], lead[1])
        batch, tokens = self.shape
        groups = batch if self.grain == "sequence" else batch * tokens
        if path not in self.leaves:
            dtype = torch.promote_types(h.dtype, torch.float32)
            self.leaves[path] = torch.zeros(groups, h.shape[-1], dtype=dtype, device=h.device, requires_grad=True)
        leaf = self.leaves[path]
        if self.grain == "sequence" and lead and lead[0] == batch and len(lead) > 1:
            leaf = leaf.reshape(batch, *[1] * (len(lead) - 1), -1)
        elif self.grain == "sequence" and lead == (batch * tokens,):
            leaf = leaf.repeat_interleave(tokens, 0)
        elif self.grain == "token" and lead in ((batch, tokens), (batch * tokens,)):
            leaf = leaf.reshape(*lead, -1)
        else:
            raise BatchError(f"{path} reads rows {list(lead)}, which are not those of {batch} × {tokens} tokens.")
        return (leaf * h).to(h.dtype)

    def gradients(self, loss: Tensor, paths: Collection[str], keep_graph: bool) -> Tensor:
        """``[sequences or tokens, coordinates]``: the gradient by example, the layers one after the other.

        Args:
            loss: A scalar of the forward.
            paths: The layers, in order.
            keep_graph: Whether another backward follows.
        """
        if missing := [path for path in paths if path not in self.leaves]:
            raise BatchError(f"{missing[0]} was not called in this forward, so it has no gradient by example.")
        leaves = [self.leaves[path] for path in paths]
        found = torch.autograd.grad(loss, leaves, retain_graph=keep_graph, allow_unused=True)
        return torch.cat(
            [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)], dim=1
        ).detach()
