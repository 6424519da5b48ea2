"""Gradient coupling: which lines of the parameters write which column of an activation.

With barriers at every product (see ``trace``) the gradient of one column reaches exactly the parameter entries that
write it. Entries that also reach another block, or the output, write the residual stream: they *leak* and belong to no
unit. What is left is read either column by column, or, for wide activations, from a handful of coded passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .codes import backward, decode
from .node import Node, cotangent
from .trace import Trace

WIDE = 48
_CHUNK = 32
_ROUNDING = 1e-14
"""Share of the largest gradient that is noise in a bias: its key part, if it is fused, is nothing else."""


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
    """Where the entries of each learned tensor are read: by its own block (``inside``), and elsewhere (``leaks``).

    ``ends``: names of the tensors that write what is read outside all blocks, or the output itself.
    """

    inside: dict[str, Tensor] = field(default_factory=dict)
    leaks: dict[str, Tensor] = field(default_factory=dict)
    ends: set[str] = field(default_factory=set)

    def sparse(self, name: str) -> bool:
        """Whether more than a quarter of the rows of a matrix have no gradient anywhere."""
        found = [mask for mask in (self.inside.get(name), self.leaks.get(name)) if mask is not None]
        if not found or found[0].ndim != 2:
            return False
        rows = torch.stack(found).any(0).any(1)
        return bool(rows.any()) and int((~rows).sum()) * 4 > len(rows)

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
            if not key and bool(mask.any()):
                reach.ends.add(name)
    return reach


def lines_into(
    node: Node, block: str, tensors: dict[str, Tensor], private: dict[str, Tensor], known: dict[tuple, list[Lines]]
) -> list[Lines]:
    """Which lines of ``tensors`` write which columns of ``node``; ``known``: what other blocks showed."""
    names = [name for name in private if name in tensors]
    if not names or not node.tensor.requires_grad:
        return []
    reached = gradients([(node.tensor, cotangent(node.tensor))], {name: tensors[name] for name in names})
    names = [name for name in reached if bool((reached[name] != 0).logical_and(private[name]).any())]
    if not names:
        return []
    wanted = {name: tensors[name] for name in names}
    key = _fingerprint(node, block, {name: (reached[name] != 0) & private[name] for name in names})
    if key in known:
        same = [replace(line, name=block + line.name, touched=dict(line.touched)) for line in known[key]]
        if _hold(same, node, wanted, private):
            return same
    projections = decode(node, wanted, private, reached) if node.columns > WIDE else None
    if projections is None:
        projections = _column_by_column(node, wanted, private)
    found = [_lines(name, tuple(tensors[name].shape), projections[name]) for name in names]
    known[key] = [replace(line, name=line.name[len(block) :], touched=dict(line.touched)) for line in found]
    return found


def _hold(lines: list[Lines], node: Node, tensors: dict[str, Tensor], private: dict[str, Tensor]) -> bool:
    """Whether lines seen elsewhere hold for two columns of an activation: other heads may have equal shapes."""
    columns = [node.columns // 2, node.columns - 1]
    hits = _hits(node, columns, tensors, private)
    for line in [line for line in lines if line.dims]:  # a number of its own writes every column
        for place, column in enumerate(columns):
            written = line.sets[column].reshape([line.shape[d] for d in line.dims])
            for axis, dim in enumerate(line.dims):
                others = tuple(a for a in range(written.ndim) if a != axis)
                if not np.array_equal(written.any(others), hits[line.name][dim][place]):
                    return False
    return True


def _fingerprint(node: Node, block: str, masks: dict[str, Tensor]) -> tuple:
    """What two activations have in common that the same entries of two blocks of one make write and read."""
    cut = len(block)
    rows = lambda m, d: m.movedim(d, 0).reshape(m.shape[d], -1).any(1).numpy().tobytes()  # noqa: E731
    reads = tuple((r.name[cut:], r.view.storage_offset(), tuple(r.view.shape), r.view.stride()) for r in node.reads)
    return (
        node.dims,
        node.columns,
        reads,
        tuple((n[cut:], tuple(m.shape), tuple(rows(m, d) for d in range(m.ndim))) for n, m in masks.items()),
    )


def _column_by_column(node: Node, tensors: dict[str, Tensor], private: dict[str, Tensor]) -> dict[str, list]:
    """``name -> per dim, bool [columns, coordinates]``: one backward a column."""
    parts = [
        _hits(node, range(start, min(start + _CHUNK, node.columns)), tensors, private)
        for start in range(0, node.columns, _CHUNK)
    ]
    return {n: [np.concatenate([p[n][d] for p in parts]) for d in range(t.ndim)] for n, t in tensors.items()}


def _hits(
    node: Node, columns: Sequence[int], tensors: dict[str, Tensor], private: dict[str, Tensor]
) -> dict[str, list[np.ndarray]]:
    """``name -> per dim, bool [chosen columns, coordinates]``: which coordinates write the columns."""
    ids, z = node.column_ids(), cotangent(node.tensor)
    seeds = torch.stack([torch.where(ids == c, z, torch.zeros((), dtype=z.dtype)) for c in columns])
    grads, _ = backward(node.tensor, list(tensors.values()), seeds, batched=True)
    found: dict[str, list[np.ndarray]] = {}
    for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
        size = torch.zeros(len(seeds), *tensor.shape) if grad is None else torch.nan_to_num(grad).abs()
        least = _ROUNDING * size.max() if name in node.biases else 0.0
        mask = (size > least) & private[name]
        sides = [tuple(d + 1 for d in range(tensor.ndim) if d != dim) for dim in range(tensor.ndim)]
        found[name] = [(mask.any(dim=others) if others else mask).numpy() for others in sides]
    return found


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
