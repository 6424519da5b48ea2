"""The differentiable steps of routing: weights that learn from some rows alone, outputs that send nothing back.

Which rows is asked in the backward, so that a gate may still be open in the forward. Weight gradients are computed from
the rows that count alone: what other rows hold cannot change a bit of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradsurgery.transforms.engine.rows import Rows

WhichRows = Callable[[], "Rows | None"]
"""The rows that count; ``None`` in a backward that is not there for the weights."""


class LinearFromRows(torch.autograd.Function):
    """``y = x Wᵀ``; ``dW`` sums over the rows that count, ``dx`` is everybody's."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, which: WhichRows) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.which = which
        return x_NI @ weight_OI.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_NO: Tensor):  # type: ignore[no-untyped-def, override]
        x_NI, weight_OI = ctx.saved_tensors
        dx = dy_NO @ weight_OI if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1] and (rows := ctx.which()) is not None:
            dw = rows.take(dy_NO).T @ rows.take(x_NI)
        return dx, dw, None


class GainsFromRows(torch.autograd.Function):
    """``y = x ⊙ g``; ``dg`` sums over the rows that count."""

    @staticmethod
    def forward(ctx: Any, x_NR: Tensor, gains_R: Tensor, which: WhichRows) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_NR, gains_R)
        ctx.which = which
        return x_NR * gains_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_NR: Tensor):  # type: ignore[no-untyped-def, override]
        x_NR, gains_R = ctx.saved_tensors
        dx = dy_NR * gains_R if ctx.needs_input_grad[0] else None
        dg = None
        if ctx.needs_input_grad[1] and (rows := ctx.which()) is not None:
            dg = (rows.take(dy_NR) * rows.take(x_NR)).sum(0)
        return dx, dg, None


class StopRows(torch.autograd.Function):
    """``y = x``; some rows send nothing back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stopped: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(stopped)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def, override]
        (stopped,) = ctx.saved_tensors
        return dy.masked_fill(stopped.unsqueeze(-1), 0.0), None
