"""Quantised weights: their shape before they were packed, and which parts of them can be moved without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gradsurgery.anatomy.groups import UnitGroup


@dataclass(frozen=True)
class Quantised:
    """How one weight is stored.

    Attributes:
        scheme: Name of the format: ``"nf4"``, ``"fp4"``, ``"int8"``, or the class of the tensor.
        shape: Shape of the weight before it was packed, which regions and units speak of.
        block: Entries that share a scale, by dimension; ``(1, 64)`` are 64 columns of one row. ``None`` where blocks
            run across the ends of rows, or are unknown: then nothing can be moved.
    """

    scheme: str
    shape: tuple[int, ...]
    block: tuple[int, ...] | None

    def __str__(self) -> str:
        if self.block is None:
            return f"{self.scheme}: no part may be permuted"
        parts = [
            f"dim {dim} inside blocks of {width}, or block by block" if 1 < width < size else f"dim {dim} freely"
            for dim, (width, size) in enumerate(zip(self.block, self.shape, strict=True))
        ]
        return f"{self.scheme}: may be permuted along {', '.join(parts)}"

    def place(self, dim: int, indices: np.ndarray) -> tuple[int, ...] | None:
        """What ties indices of a dimension to their place; equal for two sets of indices that may change places.

        Args:
            indices: ``int [width]``, the part of one unit. Whole blocks take their scales along, so nothing ties them.

        Returns:
            The blocks that the indices lie in, ``()`` for whole blocks, ``None`` where nothing may be moved.
        """
        if self.block is None:
            return None
        width = self.block[dim]
        if len(indices) % width == 0:
            rows = indices.reshape(-1, width)
            if (rows[:, 0] % width == 0).all() and (rows == rows[:, :1] + np.arange(width)).all():
                return ()
        return tuple((indices // width).tolist())


def quantised(parameter: Tensor) -> Quantised | None:
    """How a parameter is quantised, by bitsandbytes or torchao; ``None`` if it is not."""
    shape = tuple(parameter.shape)
    state: Any = getattr(parameter, "quant_state", None)  # bitsandbytes, 4 bit: packed, two entries a byte
    if state is not None:
        return Quantised(state.quant_type, tuple(state.shape), _four_bit_block(state))
    if getattr(parameter, "SCB", None) is not None:  # bitsandbytes, 8 bit: one scale a row
        return Quantised("int8", shape, (*[1] * (len(shape) - 1), shape[-1]))
    data = parameter.detach()
    if type(data) is not Tensor and hasattr(data, "dequantize") and hasattr(data, "qdata"):  # torchao
        block = tuple(getattr(data, "block_size", ()))
        return Quantised(type(data).__name__, shape, block if len(block) == len(shape) else None)
    return None


def _four_bit_block(state: Any) -> tuple[int, ...] | None:
    """Flat blocks as a rectangle of the weight; where the scales are quantised too, of all that share one of theirs."""
    rows, columns = 1, state.shape[-1]
    if len(state.shape) != 2 or columns % state.blocksize:
        return None
    if state.nested:
        rows, rest = divmod(state.state2.blocksize * state.blocksize, columns)
        if rest:
            return None
    return rows, state.blocksize


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, of a packed one as it was before."""
    state: Any = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)


def permutable(group: UnitGroup, stored: Mapping[str, Quantised]) -> tuple[int, ...]:
    """Exchange classes of a group whose weights are stored like that: equal units may be swapped without loss.

    A subdivision of ``group.exchange_classes``: rows take their scales along, columns of one quantisation block may be
    swapped with each other, and so may units that fill whole blocks.
    """
    classes: dict[tuple, int] = {}
    out = []
    for unit, own in enumerate(group.exchange_classes):
        key: list[Any] = [own]
        for name, index in group.units[unit]:
            how = stored.get(name)
            for dim, rows in index.items() if how is not None else ():
                place = how.place(dim, np.asarray(rows))  # type: ignore[union-attr]
                key.append(place if place is not None else ("alone", unit))
        out.append(classes.setdefault(tuple(key), len(classes)))
    return tuple(out)
