"""What an adapter adds to one linear layer: a kept and a quarantined part, zero when they are made.

Low-rank blocks follow Hu et al. 2021, arXiv 2106.09685, with both factors alive and their first product subtracted;
coordinates of the weight's singular basis follow AntiPaSTO's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.tensors import replicated

Probe = Callable[[Tensor], Tensor]
"""A function of a bottleneck ``[…, r]``: a perturbation of it that is zero and has the gradients by example."""


class LowRank(nn.Module):
    """``y = s ((B₀ + dB)(A₀ + dA) − B₀A₀) x = s (dB (A₀ + dA) x + B₀ dA x)``.

    ``A₀ [r, in]`` and ``B₀ [out, r]`` are random and frozen, ``dA`` (`down`) and ``dB`` (`up`) start at zero and train:
    y is exactly zero at first, both factors get gradients, nothing cancels in rounding, and weight decay towards zero
    is decay towards the start.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = _zero_linear(inputs, rank), _zero_linear(rank, outputs)
        self.down0 = frozen(torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs))
        self.up0 = frozen(torch.randn(outputs, rank, generator=generator) / math.sqrt(outputs))
        self.scale, self.probe, self.stop = scale, None, None

    probe: Probe | None
    stop: Probe | None

    def forward(self, x: Tensor) -> Tensor:
        step = self.down(x)
        bottleneck = F.linear(x, self.down0) + step
        if self.probe is not None:
            zero = self.probe(bottleneck)
            bottleneck, step = bottleneck + zero, step + zero
        if self.stop is not None:  # some rows send nothing back
            bottleneck, step = self.stop(bottleneck), self.stop(step)
        return (self.up(bottleneck) + F.linear(step, self.up0)) * self.scale

    def matrix(self) -> Tensor:
        """What the part adds to the weight, ``[out, in]``, in at least fp32."""
        down, up, down0, up0 = (
            w.detach().to(torch.promote_types(w.dtype, torch.float32))
            for w in (self.down.weight, self.up.weight, self.down0, self.up0)
        )
        return (up @ (down0 + down) + up0 @ down) * self.scale

    def toward(self, gains_R: Tensor) -> dict[str, Tensor]:
        """By own parameter, the step that multiplies the bottleneck's coordinates by ``1 + gains``."""
        down, up = (self.down0 + self.down.weight).detach(), (self.up0 + self.up.weight).detach()
        gains_R = replicated(gains_R, down)
        return {"down.weight": gains_R[:, None] * down, "up.weight": up * gains_R}

    def kill_(self) -> None:
        """Never anything but zero again: both factors are, and neither gets a gradient."""
        for weight in self.parameters():
            weight.detach().zero_()

    def spread(self) -> float:
        """RMS Frobenius norm of the weight's change when every entry takes a step of ±1 at random."""
        a, b = float(self.down0.float().square().sum()), float(self.up0.float().square().sum())
        return self.scale * math.sqrt(self.up0.shape[0] * a + self.down0.shape[1] * b)


class Diagonal(nn.Module):
    """``y = (Eᵀ e) ⊙ z``: gains of singular coordinates ``z [r]``, learned along some orthonormal axes ``E [k, r]``.

    Args:
        axes: ``E``, or indices ``[k]`` of coordinates.
        rank: r.
    """

    def __init__(self, axes: Tensor, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(axes)))
        whole = not axes.is_floating_point() and torch.equal(axes, torch.arange(rank))
        chosen = torch.eye(rank)[axes] if not axes.is_floating_point() else axes
        self.axes = None if whole else frozen(chosen.clone())

    def gains(self) -> Tensor:
        return self.weight if self.axes is None else self.weight @ self.axes

    def forward(self, z: Tensor) -> Tensor:
        return z * self.gains()

    def toward(self, gains_R: Tensor) -> dict[str, Tensor]:
        gains_R = replicated(gains_R, self.weight.detach())
        return {"weight": gains_R if self.axes is None else self.axes.detach() @ gains_R}

    def kill_(self) -> None:
        self.weight.detach().zero_()
        if self.axes is None:
            self.axes = frozen(torch.eye(len(self.weight)).to(self.weight))
        self.axes.detach().zero_()

    def spread(self) -> float:
        return math.sqrt(self.weight.numel())


class LowRankPart(nn.Module):
    """Two low-rank blocks side by side, without cross terms."""

    kept: LowRank
    quarantine: LowRank

    def __init__(self, kept: LowRank, quarantine: LowRank) -> None:
        super().__init__()
        self.kept, self.quarantine = kept, quarantine

    def forward(self, x: Tensor, active: Collection[str]) -> Tensor:
        found = [branch(x) for name, branch in self.named_children() if name in active]
        return found[0] if len(found) == 1 else found[0] + found[1]

    def matrix(self) -> Tensor:
        """What the kept part adds to the weight."""
        return self.kept.matrix()

    @property
    def probed(self) -> LowRank:
        """The module whose ``probe`` sees the coordinates of the kept part."""
        return self.kept

    @property
    def coordinates(self) -> int:
        return self.kept.down0.shape[0]


class CoordinatePart(nn.Module):
    """``y = U ((d_kept + d_quarantine) ⊙ Vh x)`` in the weight's own singular basis, which is frozen."""

    def __init__(self, left: Tensor, right: Tensor, kept: Diagonal, quarantine: Diagonal) -> None:
        super().__init__()
        self.left, self.right = frozen(left), frozen(right)
        self.kept, self.quarantine = kept, quarantine
        self.probe: Probe | None = None

    def forward(self, x: Tensor, active: Collection[str]) -> Tensor:
        z = F.linear(x, self.right)
        found = [branch(z) for name, branch in self.named_children() if name in active]
        changed = found[0] if len(found) == 1 else found[0] + found[1]
        if self.probe is not None:
            changed = changed + self.probe(z)
        return F.linear(changed, self.left)

    def matrix(self) -> Tensor:
        gains = self.kept.gains().detach()
        left, right, gains = (
            w.detach().to(torch.promote_types(w.dtype, torch.float32)) for w in (self.left, self.right, gains)
        )
        return (left * gains) @ right

    @property
    def probed(self) -> CoordinatePart:
        return self

    @property
    def coordinates(self) -> int:
        return self.right.shape[0]


Part = LowRankPart | CoordinatePart


def frozen(value: Tensor) -> nn.Parameter:
    """A tensor that moves and is saved with its module, and never trains."""
    return nn.Parameter(value, requires_grad=False)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of zeros; the global random state is left alone."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    nn.init.zeros_(layer.weight)
    return layer
