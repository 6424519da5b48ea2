"""Gradient coupling: which lines of the parameters write which column of an activation.

With barriers at every product (see ``trace``) the gradient of one column reaches exactly the parameter entries that
write it. Entries that also reach another block, or the output, write the residual stream: they *leak* and belong to no
unit. What is left is read either column by column, or, for wide activations, from a handful of coded passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .codes import decode
from .node import Node, cotangent
from .trace import Trace

WIDE = 48
_CHUNK = 32


def block_of(model: nn.Module) -> dict[str, str]:
    """Innermost element of a ``ModuleList`` or ``ModuleDict`` that holds each parameter and buffer (``""``: none)."""
    lists = {path for path, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.ModuleDict))}
    blocks: dict[str, str] = {}
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)] + [n for n, _ in model.named_buffers()]
    for name in names:
        parts = name.split(".")
        block = ""
        for i in range(len(parts) - 1):
            if ".".join(parts[:i]) in lists:
                block = ".".join(parts[: i + 1])
        blocks[name] = block
    return blocks


@dataclass
class Lines:
    """What one parameter contributes to the columns of some activations.

    Args:
        dims: Dimensions along which its entries differ in what they write; a line is one coordinate in each.
        sets: ``bool [columns, lines]``: line writes column.
        touched: Coordinates that take part at all, for the other dimensions where that is not everything.
        dense: ``bool [lines]``: writes every column.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    sets: np.ndarray
    touched: dict[int, np.ndarray]
    dense: np.ndarray


@dataclass
class Reach:
    """Where the entries of each learned tensor are read: by its own block (``inside``), and elsewhere (``leaks``)."""

    inside: dict[str, Tensor] = field(default_factory=dict)
    leaks: dict[str, Tensor] = field(default_factory=dict)

    def private(self, name: str) -> Tensor | None:
        """Mask of the entries that only their own block reads, ``None`` if there are none."""
        mask = self.inside.get(name)
        if mask is None:
            return None
        if name in self.leaks:
            mask = mask & ~self.leaks[name]
        return mask if bool(mask.any()) else None


def gradients(pairs: Iterable[tuple[Tensor, Tensor]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of ``sum <cotangent, activation>`` with respect to the tensors that it reaches."""
    pairs = [(x, z) for x, z in pairs if x.requires_grad]
    if not pairs or not tensors:
        return {}
    outputs, seeds = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(tensors.values()), seeds, retain_graph=True, allow_unused=True)
    return {name: torch.nan_to_num(g) for name, g in zip(tensors, found, strict=True) if g is not None}


def reach_of(trace: Trace, outputs: list[Tensor], blocks: dict[str, str]) -> Reach:
    """One backward per block, and one for the output and everything outside the blocks."""
    readers: dict[str, list[Node]] = {}
    for node in trace.nodes.values():
        for block in {blocks[read.name] for read in node.reads}:
            readers.setdefault(block, []).append(node)
    reach = Reach()
    ends = [(x, cotangent(x)) for x in outputs]
    keys: list[str | None] = [*readers, None]
    for key in keys:
        pairs = ends if key is None else [(node.tensor, cotangent(node.tensor)) for node in readers[key]]
        for name, gradient in gradients(pairs, trace.tensors).items():
            mask = gradient != 0
            target = reach.inside if key == blocks[name] else reach.leaks
            target[name] = target[name] | mask if name in target else mask
    return reach


def lines_into(node: Node, tensors: dict[str, Tensor], private: dict[str, Tensor]) -> list[Lines]:
    """Which lines of ``tensors`` write which columns of ``node``."""
    names = [name for name in private if name in tensors]
    if not names or not node.tensor.requires_grad:
        return []
    reached = gradients([(node.tensor, cotangent(node.tensor))], {name: tensors[name] for name in names})
    names = [name for name in reached if bool((reached[name] != 0).logical_and(private[name]).any())]
    if not names:
        return []
    wanted = {name: tensors[name] for name in names}
    projections = decode(node, wanted, private, reached) if node.columns > WIDE else None
    if projections is None:
        projections = _column_by_column(node, wanted, private)
    return [_lines(name, tuple(tensors[name].shape), projections[name]) for name in names]


def _column_by_column(node: Node, tensors: dict[str, Tensor], private: dict[str, Tensor]) -> dict[str, list]:
    """``name -> per dim, bool [columns, coordinates]``: one backward a column, batched where torch can."""
    ids, z = node.column_ids(), cotangent(node.tensor)
    found: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in tensor.shape] for name, tensor in tensors.items()}
    batched = True
    for start in range(0, node.columns, _CHUNK):
        columns = range(start, min(start + _CHUNK, node.columns))
        seeds = torch.stack([torch.where(ids == c, z, torch.zeros((), dtype=z.dtype)) for c in columns])
        grads, batched = _backward(node.tensor, list(tensors.values()), seeds, batched)
        for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
            mask = (torch.nan_to_num(grad) != 0) & private[name] if grad is not None else None
            for dim in range(tensor.ndim):
                others = [d + 1 for d in range(tensor.ndim) if d != dim]
                if mask is None:
                    hit = np.zeros((len(columns), tensor.shape[dim]), dtype=bool)
                else:
                    hit = (mask.any(dim=tuple(others)) if others else mask).numpy()
                found[name][dim].append(hit)
    return {name: [np.concatenate(parts) for parts in dims] for name, dims in found.items()}


def _backward(x: Tensor, tensors: list[Tensor], seeds: Tensor, batched: bool) -> tuple[list[Tensor | None], bool]:
    if batched:
        try:
            grads = torch.autograd.grad(x, tensors, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
            return list(grads), True
        except RuntimeError:
            pass  # some backward formulas know no batching
    each = [torch.autograd.grad(x, tensors, seed, retain_graph=True, allow_unused=True) for seed in seeds]
    return [None if grads[0] is None else torch.stack(grads) for grads in zip(*each, strict=True)], False


def _lines(name: str, shape: tuple[int, ...], projections: list[np.ndarray]) -> Lines:
    """Join the dimensions along which a tensor is local; note what the others are restricted to."""
    dims, touched = [], {}
    alive = projections[0].any(1) if projections else np.ones(1, dtype=bool)
    for dim, hit in enumerate(projections):
        some, every = hit.any(0), hit[alive].all(0)
        if (some & ~every).any() and len(hit) > 1:
            dims.append(dim)
        elif not some.all():
            touched[dim] = np.flatnonzero(some)
    if not dims:
        dims = [int(np.argmax([len(touched.get(d, ())) > 1 for d in range(len(shape))]))] if shape else []
        if dims:
            touched.pop(dims[0], None)
    columns = len(projections[0]) if projections else 1
    sets = np.ones((columns, 1), dtype=bool)
    for dim in dims:
        sets = (sets[:, :, None] & projections[dim][:, None, :]).reshape(columns, -1)
    return Lines(name, shape, tuple(dims), sets, touched, np.asarray(sets[alive].all(0) & (columns > 1)))
