"""Consumers whose input features can be edited, but whose own computation is not ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.tensors import Indices
from gradsurgery.transforms.engine.handlers import Call, Handler
from gradsurgery.transforms.engine.linear import feature_columns, flagged
from gradsurgery.transforms.engine.program import Program
from gradsurgery.transforms.engine.rows import RowClasses
from gradsurgery.transforms.engine.run import Run


class _EditInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, edits: list[tuple[str, Indices, int]], classes: RowClasses) -> Tensor:  # type: ignore[override]
        ctx.rest = dim, edits, classes
        return _cut(x, dim, [e for e in edits if e[0] == "zero"], classes)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def, override]
        dim, edits, classes = ctx.rest
        return _cut(dy, dim, edits, classes), None, None, None


def _cut(x: Tensor, dim: int, edits: list[tuple[str, Indices, int]], classes: RowClasses) -> Tensor:
    """A copy of ``x`` with the features ``dim`` of flagged rows (all dimensions before it) at zero."""
    if dim == x.dim() - 1:
        out = x.reshape(-1, x.shape[-1]).clone()
        for _, columns, column in edits:
            flagged(classes, column).fill_(out, columns, 0.0)
        return out.reshape(x.shape)
    out = x.clone()  # channels of a convolution: [batch, channel, …]
    for _, columns, column in edits:
        rows = flagged(classes, column)
        index = torch.arange(x.shape[0], device=x.device)
        out[rows.take(index)[:, None], columns.index_on(x.device)[None]] = 0.0
    return out


class InputHandler(Handler):
    """A consumer whose input features can be edited, but whose computation is not ours (subclasses, convolutions)."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        (edits,) = program.edits.values()
        self.dim = 1 if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1
        self.edits = [(edit.kind, feature_columns(edit, 1), edit.column) for edit in edits]

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        (x, *rest), kwargs = call if call[0] else ((call[1]["input"],), {})
        dim = self.dim % x.dim()
        lead = tuple(x.shape[:1]) if self.dim == 1 else tuple(x.shape[:-1])
        classes = run.classes(self.program, lead, x.device)
        return (_EditInput.apply(x, dim, self.edits, classes), *rest), kwargs
