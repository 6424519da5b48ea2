"""From a view of a parameter back to coordinates of the parameter: by storage, offset and strides, never by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Index = dict[int, np.ndarray]
"""``dim of the parameter -> int64 [lines, width]``; dimensions that are not named are whole."""


def lines_of(view: Tensor, parameter: Tensor, dims: Sequence[int]) -> Index | None:
    """What each line of ``view`` along ``dims`` (row-major over them) covers in ``parameter``.

    Returns:
        ``None`` where a line is no product of coordinates, or the parameter is not contiguous.
    """
    if not parameter.is_contiguous():
        return None
    if view.shape == parameter.shape and view.stride() == parameter.stride() and len(dims) == 1:
        return {dims[0]: np.arange(view.shape[dims[0]])[:, None]}
    start = view.storage_offset() - parameter.storage_offset()
    flat = np.full((1,) * view.ndim, start, dtype=np.int64)
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        flat = flat + (np.arange(size) * stride).reshape([-1 if d == dim else 1 for d in range(view.ndim)])
    flat = np.moveaxis(flat, list(dims), range(len(dims)))
    flat = flat.reshape(math.prod(view.shape[d] for d in dims), -1)
    if flat.min() < 0 or flat.max() >= parameter.numel():
        return None
    return product_of(flat, tuple(parameter.shape))


def product_of(flat: np.ndarray, shape: tuple[int, ...]) -> Index | None:
    """Per line of flat positions, the coordinates it takes in each dimension; ``None`` if they are no product."""
    index: Index = {}
    size = 1
    for dim, coordinates in enumerate(np.unravel_index(flat, shape)):
        ordered = np.sort(coordinates, axis=1)
        fresh = np.ones_like(ordered, dtype=bool)
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        counts = fresh.sum(1)
        if (counts != counts[0]).any():
            return None
        size *= int(counts[0])
        if counts[0] < shape[dim]:
            index[dim] = ordered[fresh].reshape(len(flat), -1)
    return index if size == flat.shape[1] else None
