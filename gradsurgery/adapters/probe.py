"""Gradients by example, read in one backward: a zero perturbation of every bottleneck, one a group of rows.

With ``y = B ((1 + c_b) ⊙ A x)`` for the rows of example b, ``dL/dc_b = Σ_t (A x_t) ⊙ (Bᵀ δ_t)`` is the gradient of the
gains of the bottleneck's coordinates from that example alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
        self.called: set[str] = set()

    def prepare(self, layers: Mapping[str, tuple[int, Tensor]]) -> None:
        """Make the perturbations before the forward, where its rows are known: graphs cannot make what they differ by.

        Args:
            layers: Number of coordinates, and a tensor on the device that computes them, by layer.
        """
        if self.shape is None:
            return
        for path, (coordinates, like) in layers.items():
            self.leaves[path] = self._leaf(coordinates, like)

    def _leaf(self, coordinates: int, like: Tensor) -> Tensor:
        assert self.shape is not None
        groups = self.shape[0] if self.grain == "sequence" else self.shape[0] * self.shape[1]
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.zeros(groups, coordinates, dtype=dtype, device=like.device, requires_grad=True)

    def __call__(self, path: str, h: Tensor) -> Tensor:
        """``c ⊙ h`` with ``c = 0``, at the layer ``path``; the same perturbation when it is called again."""
        lead = tuple(h.shape[:-1])
        if self.shape is None:
            if len(lead) != 2:
                raise BatchError(f"{path} reads rows {list(lead)}, which do not tell examples apart.")
            self.shape = (lead[0], lead[1])
        batch, tokens = self.shape
        if path not in self.leaves or self.leaves[path].device != h.device:  # offloaded weights lie elsewhere
            self.leaves[path] = self._leaf(h.shape[-1], h)
        if not torch.compiler.is_compiling():
            self.called.add(path)
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
        leaves = {path: self.leaves[path] for path in paths if path in self.leaves}
        found = torch.autograd.grad(loss, [*leaves.values()], retain_graph=keep_graph, allow_unused=True)
        grads = dict(zip(leaves, found, strict=True))
        if missing := [path for path in paths if grads.get(path) is None and path not in self.called]:
            raise BatchError(f"{missing[0]} was not called in this forward, so it has no gradient by example.")
        return torch.cat([torch.zeros_like(leaves[p]) if g is None else g for p, g in grads.items()], dim=1).detach()
