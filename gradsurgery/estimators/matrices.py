"""Weights as matrices ``[out, in]``: linear layers, Conv1D, convolutions and fused experts through one view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from gradsurgery.anatomy.space import own_class


@dataclass(frozen=True)
class Layout:
    """How a weight is a matrix ``[out, in]``, or a stack of them ``[stack, out, in]``.

    Attributes:
        kind: ``"linear"``, ``"conv"`` (a matrix a group, inputs are patches ``[channel, offsets]``) or ``"experts"`` (a
            matrix an expert).
        transposed: Stored as ``[in, out]``.
        groups: Of a convolution.
    """

    kind: str = "linear"
    transposed: bool = False
    groups: int = 1

    def matrices(self, weight: Tensor) -> Tensor:
        """``[out, in]`` or ``[stack, out, in]``; a view, but for convolutions whose memory is not contiguous."""
        if self.kind == "conv":
            rows = weight.reshape(weight.shape[0], -1)
            return rows if self.groups == 1 else rows.unflatten(0, (self.groups, -1))
        return weight.mT if self.transposed else weight

    def weight(self, matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `matrices`, for a weight of this shape."""
        if self.kind == "conv":
            return matrices.reshape(shape)
        return matrices.mT if self.transposed else matrices

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(out, in)`` or ``(stack, out, in)`` of a weight."""
        if self.kind == "conv":
            inputs = 1
            for n in shape[1:]:
                inputs *= n
            return (shape[0], inputs) if self.groups == 1 else (self.groups, shape[0] // self.groups, inputs)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape


def layout_of(module: nn.Module, name: str) -> Layout | None:
    """The layout of the weight ``name`` of a module whose input it multiplies; ``None`` where that is not known."""
    if name != "weight":
        return None
    if isinstance(module, nn.Linear):
        return Layout()
    if own_class(module) is Conv1D:
        return Layout(transposed=True)
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return Layout("conv", groups=module.groups)
    return None


def experts_of(module: nn.Module) -> list[str]:
    """Names of the 3-D weights of a module of fused experts: several matrices of one number of experts."""
    own: dict[str, Any] = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    is_fused = "expert" in type(module).__name__.lower() and len({p.shape[0] for p in own.values()}) == 1
    return list(own) if is_fused else []
