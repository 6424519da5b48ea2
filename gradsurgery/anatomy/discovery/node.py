"""What a trace notes: activations, the weights that read them, and which of their entries belong to each column."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .coordinates import Index, lines_of


@dataclass
class Read:
    """A parameter view that reads an activation: ``index`` says which of its entries belong to each column."""

    name: str
    view: Tensor
    parameter: Tensor
    column_dims: tuple[int, ...]
    groups: int = 1
    bias: str | None = None
    bias_view: Tensor | None = None
    filters: bool = False
    """Whether it is a convolution's: then its bias has one entry a filter."""
    _index: Index | None = None

    @property
    def index(self) -> Index:
        if self._index is None:
            if self.groups > 1:
                self._index = _grouped(self.view, self.groups)
            else:
                self._index = lines_of(self.view, self.parameter, self.column_dims) or {}
        return self._index


@dataclass
class Node:
    """An activation that at least one weight reads, with the dimensions that are summed away (its columns)."""

    tensor: Tensor
    dims: tuple[int, ...]
    reads: list[Read] = field(default_factory=list)
    biases: frozenset[str] = frozenset()
    """Biases of the products around it."""
    shared: int = 0
    """How many matrices a batched product reads the activation with, 0 for a plain one."""

    @property
    def columns(self) -> int:
        return int(np.prod([self.tensor.shape[d] for d in self.dims]))

    def column_ids(self) -> Tensor:
        """Column number of every entry, broadcastable to the activation."""
        sizes = [self.tensor.shape[d] for d in self.dims]
        ids = torch.arange(self.columns).reshape(sizes)
        order = sorted(range(len(self.dims)), key=lambda i: self.dims[i])
        shape = [n if d in self.dims else 1 for d, n in enumerate(self.tensor.shape)]
        return ids.permute(order).reshape(shape)


def cotangent(tensor: Tensor, seed: int = 7) -> Tensor:
    """A fixed random direction of the shape of ``tensor``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def _grouped(view: Tensor, groups: int) -> Index:
    """Columns of a grouped convolution: channel ``c`` is read by the filters of its own group only."""
    filters, inner = view.shape[0] // groups, view.shape[1]
    group = np.repeat(np.arange(groups), inner)
    return {0: group[:, None] * filters + np.arange(filters)[None], 1: np.tile(np.arange(inner), groups)[:, None]}
