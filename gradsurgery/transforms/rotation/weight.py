"""One weight in rotated coordinates: read some of them, put them back, scale them, without a second weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery.estimators.bits import packed, unpacked
from gradsurgery.estimators.coordinates import Coordinates
from gradsurgery.transforms.rotation.axes import Part, local, part_of

_CHUNK = 1 << 22
"""Entries of a matrix that are worked on at a time."""


@dataclass(frozen=True)
class Piece:
    """Some rows (of a stack: some matrices) of ``A``, and which of their coordinates are meant; ``None`` means all."""

    rows: slice
    bits: Tensor | None
    shape: tuple[int, ...]

    def mask(self) -> Tensor | None:
        return None if self.bits is None else unpacked(self.bits, self.shape)


class RotatedWeight:
    """The masked coordinates ``(A U) o M`` of a weight or of a tensor like it (its gradient).

    ``A`` is the weight's matrix ``[…, r, c]``, at the output side its transpose, and ``U [c, k]``. Where the masked
    columns of ``U`` are signed unit vectors, or whole rows are masked in a complete basis, coordinates are entries, and
    moving them is exact.

    Args:
        coordinates: Basis and mask.
        name: The weight's name.
        parameter: The weight, as it lies on this rank.
        vectors: The basis on the weight's device, ``None`` for the identity.

    Attributes:
        vectors: What of the basis this rank's part needs, a view; ``None`` where coordinates are entries. At the input
            side every row needs all of it; at the output side, of which FSDP2 shards the outputs, a rank needs its
            own outputs' rows, and of a stack its own matrices.
    """

    def __init__(self, coordinates: Coordinates, name: str, parameter: Tensor, vectors: Tensor | None) -> None:
        basis = coordinates.basis
        self.name, self.side, self.layout = name, basis.side, basis.site(name).layout
        self.part: Part = part_of(parameter, self.layout, self.side, name)
        shape, device = basis.rotated_shape(name), local(parameter).device
        mask = (
            coordinates.masks[name] if coordinates.masks is not None else torch.ones(1).bool().expand(len(shape) * (1,))
        )
        mask = mask.to(device)
        if self.side == "output":
            mask, shape = mask.mT, (*shape[:-2], shape[-1], shape[-2])
        self.empty = not bool(mask.any())
        self.plain: Tensor | None = None
        self.pieces: list[Piece] = []
        self.index: Tensor | None = None
        self.vectors = vectors
        self._copied: Tensor | None = None
        if self.empty:
            return
        width = basis.width(name)
        if (own := _entries(mask, shape, width, vectors)) is not None:
            self._plan_entries(own, parameter)
        else:
            self._plan_rotated(mask, shape, width)
            assert vectors is not None
            vectors = vectors[..., self.part.columns, :]
            self.vectors = vectors[self.part.stack] if vectors.dim() == 3 else vectors

    def _plan_entries(self, own: Tensor, parameter: Tensor) -> None:
        """The coordinates are entries: a mask of the weight's own shape."""
        own = own.mT if self.side == "output" else own
        own = self.layout.weight(own, tuple(parameter.shape))
        self.plain = packed(own[self.part.slices].contiguous())
        self.vectors = None

    def _plan_rotated(self, mask: Tensor, shape: tuple[int, ...], width: int) -> None:
        assert self.vectors is not None
        same = mask.reshape(-1, mask.shape[-1])  # whole columns are one row of a mask, the same for every stack
        whole = same.shape[0] == 1 and mask.dim() == len(shape)
        chosen = same.any(0).expand(shape[-1])
        if not bool(chosen.all()):
            self.index = chosen.nonzero().squeeze(-1)
        start, size = _place(self.part.stack if len(shape) == 3 else self.part.rows, shape[0])
        per_row = max(width, shape[-1]) * (shape[1] if len(shape) == 3 else 1)
        step = max(_CHUNK // per_row, 1)
        for first in range(0, size, step):
            rows = slice(first, min(first + step, size))
            if whole:
                self.pieces.append(Piece(rows, None, ()))
                continue
            lead = slice(start + rows.start, start + rows.stop)
            part = mask[lead] if mask.shape[0] > 1 else mask
            if len(shape) == 3:
                part = part[:, self.part.rows] if part.shape[1] > 1 else part
                _, length = _place(self.part.rows, shape[1])
                full: tuple[int, ...] = (rows.stop - rows.start, length, shape[-1])
            else:
                full = (rows.stop - rows.start, shape[-1])
            part = part.expand(full)
            part = part if self.index is None else part.index_select(-1, self.index)
            self.pieces.append(Piece(rows, packed(part), tuple(part.shape)))

    def take(self, tensor: Tensor) -> list[Tensor]:
        """The masked coordinates of a tensor; fp32 (fp64 stays), entries as they are."""
        own = local(tensor)
        if self.plain is not None:
            return [own[unpacked(self.plain, tuple(own.shape))]]
        return [_masked(found, piece.mask()) for piece, _, found, _ in self._each(own)]

    def restore_(self, tensor: Tensor, held: list[Tensor], factor: float = 0.0) -> None:
        """Put the masked coordinates back to ``held``; or ``factor`` of the way from there to where they are."""
        own = local(tensor)
        if self.plain is not None:
            mask = unpacked(self.plain, tuple(own.shape))
            values = held[0] if not factor else torch.lerp(held[0], own[mask], factor)
            own.masked_scatter_(mask, values)
            return
        for (piece, rows, found, vectors), before in zip(self._each(own), held, strict=True):
            chosen = piece.mask()
            found -= before if chosen is None else found.masked_scatter(chosen, before)
            _subtract(rows, found, vectors, 1.0 - factor)
        self._write(own)

    def scale_(self, tensor: Tensor, factor: float) -> None:
        """Multiply the masked coordinates by ``factor``."""
        own = local(tensor)
        if self.plain is not None:
            mask = unpacked(self.plain, tuple(own.shape))
            if factor:
                own.copy_(torch.where(mask, own * factor, own))
            else:
                own.masked_fill_(mask, 0.0)
            return
        for piece, rows, found, vectors in self._each(own):
            if (chosen := piece.mask()) is not None:
                found.masked_fill_(~chosen, 0.0)
            _subtract(rows, found, vectors, 1.0 - factor)
        self._write(own)

    def _each(self, own: Tensor) -> Iterator[tuple[Piece, Tensor, Tensor, Tensor]]:
        """``(piece, its rows of A, their coordinates, vectors)``; what is written to the rows stays."""
        assert self.vectors is not None
        matrix = self.layout.matrices(own)
        self._copied = matrix if matrix.untyped_storage().data_ptr() != own.untyped_storage().data_ptr() else None
        matrix = matrix.mT if self.side == "output" else matrix
        dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
        vectors = self.vectors if self.index is None else self.vectors.index_select(-1, self.index)
        vectors = vectors.to(dtype)
        for piece in self.pieces:
            rows = matrix[piece.rows]
            each = vectors[piece.rows] if vectors.dim() == 3 else vectors
            yield piece, rows, self.part.sum_(rows.to(dtype) @ each), each

    def _write(self, own: Tensor) -> None:
        """Where the matrix is no view of the weight (its memory is not contiguous), copy it back."""
        if self._copied is not None:
            own.copy_(self.layout.weight(self._copied, tuple(own.shape)))
            self._copied = None


def _entries(mask: Tensor, shape: tuple[int, ...], width: int, vectors: Tensor | None) -> Tensor | None:
    """The mask over entries of ``A``, where the masked coordinates are entries; else ``None``."""
    full = (*shape[:-1], width)
    if vectors is None:
        return mask.expand(full)
    if shape[-1] == width and (mask.shape[-1] == 1 or bool(mask.all())):
        return mask.expand(full) if mask.shape[-1] == 1 else mask.new_ones(full)
    chosen = mask.reshape(-1, mask.shape[-1]).any(0).expand(shape[-1])
    units = (vectors != 0).sum(-2).eq(1) & vectors.abs().amax(-2).eq(1)
    if not bool((units | ~chosen).all()):
        return None
    place = vectors.abs().argmax(-2)  # […, k]
    place = place.unsqueeze(-2).expand(shape)
    return (
        torch.zeros(full, dtype=torch.uint8, device=mask.device)
        .scatter_reduce_(-1, place, (mask & chosen).expand(shape).to(torch.uint8), "amax")
        .bool()
    )


def _place(part: slice, size: int) -> tuple[int, int]:
    start, stop, _ = part.indices(size)
    return start, max(stop - start, 0)


def _masked(found: Tensor, mask: Tensor | None) -> Tensor:
    return found if mask is None else found[mask]


def _subtract(rows: Tensor, coordinates: Tensor, vectors: Tensor, factor: float) -> None:
    """``rows <- rows - factor * coordinates U^T``, rounded once."""
    if rows.dtype == coordinates.dtype:
        rows.sub_(coordinates @ vectors.mT, alpha=factor)
    else:
        rows.copy_(rows.to(coordinates.dtype).sub_(coordinates @ vectors.mT, alpha=factor))
