"""Embeddings under a program: what a table row receives is the output gradient of the tokens that looked it up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.space import own_class
from gradsurgery.errors import BatchError
from gradsurgery.tensors import Indices
from gradsurgery.transforms.engine.flags import without_batch
from gradsurgery.transforms.engine.handlers import Call, Handler
from gradsurgery.transforms.engine.program import Program
from gradsurgery.transforms.engine.run import Run


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
        if own_class(module) is not nn.Embedding:  # makes ids of its own (BART's positions): its output says how many
            self.calls.append(ids)
            return args, kwargs
        if self.program.per_row:
            full = without_batch(tuple(ids.shape), ids, run.all_flags(self.program), self.program.path, run.shape)
            if full is not None:
                ids = ids.expand(full)
                args, kwargs = ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, "input": ids})
        if self.program.per_row and not torch.compiler.is_compiling() and is_distance_table(ids):
            refuse_mixed(self.program, run)
        self.calls.append(ids)
        return args, kwargs

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        ids, changes = self.calls.pop(), []
        if own_class(module) is not nn.Embedding:
            lead, path = tuple(output.shape[:-1]), self.program.path
            given = run.all_flags(self.program)
            full = without_batch(lead, None, given, path, run.shape) if given else None
            if full is not None:
                output = output.expand(*full, output.shape[-1])
            ids = torch.zeros(output.shape[:-1], dtype=torch.long, device=output.device)  # stands for their number
        table_of_distances = not torch.compiler.is_compiling() and is_distance_table(ids)
        flags = run.stacked(self.program, tuple(ids.shape), ids.device, not table_of_distances)
        flags = flags.reshape(-1, *ids.shape)
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
