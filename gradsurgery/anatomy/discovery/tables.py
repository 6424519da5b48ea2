"""Tables of experts by token (hash routing): the experts of a layer are units, though none can be exchanged.

Such a table holds experts' numbers, which no permutation of weights changes. Renumbered along with the experts it
leaves the outputs alone, and that shows which lines belong to each expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .draft import Draft
from .moves import permute_, restored
from .verify import Judge


@torch.no_grad()
def fill_tables(model: nn.Module, seed: int = 0) -> None:
    """Fill tables that are zero until a checkpoint is loaded: different experts for each token, at random."""
    generator = torch.Generator().manual_seed(seed)
    for _, table, experts in _tables(model):
        if not table.any():
            numbers = torch.rand(len(table), experts, generator=generator).argsort(-1)
            table.copy_(numbers[:, : table.shape[1]])


def tables_of(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Name of each table -> the table, and how many experts it chooses from."""
    return {name: (table, experts) for name, table, experts in _tables(model)}


def _tables(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Persistent buffers of whole numbers, several a line, beside a matrix with more lines than that."""
    for prefix, module in model.named_modules():
        experts = next((len(p) for p in module.parameters(recurse=False) if p.ndim == 2), 0)
        for name, table in module.named_buffers(recurse=False):
            whole = table.dtype is torch.long and table.ndim == 2 and 0 < table.shape[1] <= experts
            if whole and len(table) > 1 and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, table, experts


def hold_renumbered(draft: Draft, tables: dict[str, tuple[Tensor, int]], judge: Judge) -> bool:
    """Whether experts can be permuted if the tables around them are renumbered along."""
    near = [t for n, (t, experts) in tables.items() if n.startswith(draft.block + ".") and experts == draft.count]
    if not near:
        return False
    order = judge.shuffle(draft)
    with torch.no_grad(), restored(judge.tensors, draft.slots), _renumbered(near, order.argsort()):
        permute_(judge.tensors, draft.slots, order)
        return judge.difference(judge.forward()) < judge.tolerance


@contextmanager
def _renumbered(tables: list[Tensor], numbers: Tensor) -> Iterator[None]:
    saved = [table.clone() for table in tables]
    try:
        for table in tables:
            table.copy_(numbers[table])
        yield
    finally:
        for table, values in zip(tables, saved, strict=True):
            table.copy_(values)
