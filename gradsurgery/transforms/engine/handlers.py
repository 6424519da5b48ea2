"""How one module runs under its program: by layer type, from exact and cheap to exact and general."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsurgery.anatomy.space import own_class
from gradsurgery.errors import BatchError
from gradsurgery.tensors import Indices
from gradsurgery.transforms.engine.adjoint import changes_of, under_adjoint
from gradsurgery.transforms.engine.linear import feature_columns, flagged
from gradsurgery.transforms.engine.linear_op import LinearPlan, compiled_linear, surgical_linear
from gradsurgery.transforms.engine.program import Program
from gradsurgery.transforms.engine.rows import RowClasses
from gradsurgery.transforms.engine.run import Run

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Handler:
    """Runs a module under a program: ``before`` may change its call, ``after`` its output. Pure but for a stack."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        self.program = program

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        return call

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        return output

    def reset(self, module: nn.Module) -> None:
        """Forget a call that was interrupted."""


class LinearHandler(Handler):
    """Exact ``nn.Linear`` and ``Conv1D``: the module computes on an empty slice, the plan gives the real output."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        transposed = own_class(module) is Conv1D
        shape = tuple(module.weight.shape)  # type: ignore[union-attr, arg-type]
        self.plan = LinearPlan(program, shape, shape[1] if transposed else shape[0], transposed)
        self.inputs: list[Tensor] = []

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        (x, *rest), kwargs = call if call[0] else ((call[1]["input"],), {})
        self.inputs.append(x)
        return (x.reshape(-1, x.shape[-1])[:0], *rest), kwargs

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        x = self.inputs.pop()
        weight: Any = module.weight
        bias: Any = module.bias
        if torch.is_autocast_enabled(x.device.type):
            x, weight, bias = (
                t.to(output.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, weight, bias)
            )
        lead = tuple(x.shape[:-1])
        if torch.compiler.is_compiling():
            flags = run.stacked(self.program, lead, x.device)
            return compiled_linear(x, weight, bias, self.plan, flags, run.passes)
        classes = run.classes(self.program, lead, x.device)
        return surgical_linear(x, weight, bias, self.plan, classes, run.passes)

    def reset(self, module: nn.Module) -> None:
        self.inputs.clear()


class _EmbeddingGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, ids: Tensor, changes: list[tuple[Tensor | None, Tensor | None, Indices, float]]
    ) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.changes = changes
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def, override]
        (ids,) = ctx.saved_tensors
        dy = dy.clone()
        for flags, table, columns, factor in ctx.changes:
            chosen = torch.ones_like(ids, dtype=torch.bool) if flags is None else flags.expand(ids.shape)
            if table is not None:
                chosen = chosen & table[ids]
            part = columns.narrow(dy, -1) if columns.span is not None else columns.take(dy, -1)
            scaled = torch.zeros_like(part) if factor == 0.0 else part * factor
            part = torch.where(chosen[..., None], scaled, part)
            if columns.span is not None:
                columns.narrow(dy, -1).copy_(part)
            else:
                dy.index_copy_(dy.dim() - 1, columns.index_on(dy.device), part)
        return dy, None, None


class EmbeddingHandler(Handler):
    """Embeddings: what a table row receives is the output gradient of the tokens that looked it up."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        self.calls: list[Tensor] = []
        self.tables: dict[tuple[int, torch.device], Tensor] = {}

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        args, kwargs = call
        ids = args[0] if args else kwargs["input"]
        if type(module) is not nn.Embedding:  # makes ids of its own (BART's positions): its output tells how many
            self.calls.append(ids)
            return args, kwargs
        if self.program.per_row and ids.dim() and ids.shape[0] == 1:
            batch = run.batch_size(self.program)
            if batch > 1:
                ids = ids.expand(batch, *ids.shape[1:])
                args, kwargs = ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, "input": ids})
        if self.program.per_row and not torch.compiler.is_compiling() and is_distance_table(ids):
            refuse_mixed(self.program, run)
        self.calls.append(ids)
        return args, kwargs

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        ids, changes = self.calls.pop(), []
        if type(module) is not nn.Embedding:
            batch = run.batch_size(self.program) if self.program.per_row else 1
            if output.shape[0] == 1 and batch > 1:
                output = output.expand(batch, *output.shape[1:])
            ids = torch.zeros(output.shape[:-1], dtype=torch.long, device=output.device)  # stands for their number
        flags = run.stacked(self.program, tuple(ids.shape), ids.device).reshape(-1, *ids.shape)
        for atom in self.program.atoms["weight"]:
            for column, factor in atom.factors:
                value = 1.0 / run.passes if isinstance(factor, str) else factor
                for rows, columns in atom.boxes:
                    table = None if rows.whole else self._table(rows, ids.device)
                    changes.append((None if column < 0 else flags[column], table, columns, value))
        return _EmbeddingGradient.apply(output, ids, changes)

    def _table(self, rows: Indices, device: torch.device) -> Tensor:
        key = (id(rows), device)
        if key not in self.tables:
            table = torch.zeros(rows.size, dtype=torch.bool)
            table[rows.indices] = True
            self.tables[key] = table.to(device)
        return self.tables[key]

    def reset(self, module: nn.Module) -> None:
        self.calls.clear()


def is_distance_table(ids: Tensor) -> bool:
    """Whether ids are functions of ``column - row``, as T5's relative positions [query, key]: they have no batch."""
    if ids.dim() != 2 or min(ids.shape) < 2:
        return False
    return bool(torch.equal(ids[1:, 1:], ids[:-1, :-1]) and (ids != ids[0, 0]).any())


def refuse_mixed(program: Program, run: Run) -> None:
    for where in program.wheres:
        flags = run.flags(where, program.path)
        if bool(flags.any()) and not bool(flags.all()):
            raise BatchError(
                f"{program.path} looks up distances between positions, shared by all examples of a batch, so flags "
                f"cannot tell its rows apart. Leave it out of the region, or flag the whole batch alike."
            )


class SwapHandler(Handler):
    """Any module, every row: its parameters are identity-forward functions of themselves while it runs."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        self.own: list[dict[str, Any]] = []

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        self.own.append({name: module._parameters[name] for name in self.program.atoms})
        for name, atoms in self.program.atoms.items():
            weight = module._parameters[name]
            if weight is not None:
                module._parameters[name] = under_adjoint(weight, changes_of(atoms, 0, run.passes))  # type: ignore[assignment]
        return call

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        module._parameters.update(self.own.pop())
        return output

    def reset(self, module: nn.Module) -> None:
        while self.own:
            module._parameters.update(self.own.pop())


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
