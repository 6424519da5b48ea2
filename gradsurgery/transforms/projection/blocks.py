"""The blocks of a projection at work: what is measured of them, and which part takes which coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurgery.transforms.projection.layout import Part
from gradsurgery.transforms.projection.measure import over_all_rows, part_products, row_blocks
from gradsurgery.transforms.projection.targets import flat_of, rows_of

if TYPE_CHECKING:
    from gradsurgery.transforms.projection.work import Work


class NotFinite(ArithmeticError):
    """A sum came out as nan or inf."""


class Blocks:
    """Blocks of one kind.

    Attributes:
        before: Gram matrices of the parts before projecting.
        factors: What was removed in the first round, ``[blocks, vectors]``.
    """

    parts: Sequence[Part]
    vanished = 0

    def __init__(self, work: Work, parts: Sequence[Part]) -> None:
        self.work, self.parts = work, parts
        self.before = torch.zeros(len(parts), work.count, work.count, dtype=torch.float64)
        self.factors = torch.zeros(0, work.count - 1, dtype=torch.float64)

    def measure(self, parts: Sequence[Part]) -> Tensor:
        """Gram matrices of all blocks, zero for those of other parts."""
        raise NotImplementedError

    def begin(self, gram: Tensor, factors: Tensor) -> None:
        """Remember what was measured and removed first."""
        raise NotImplementedError

    def by_part(self) -> Tensor:
        """Gram matrices of the parts as they are now, over all ranks: ``[parts, vectors, vectors]``."""
        raise NotImplementedError

    def of(self, part: Part, by_block: Tensor) -> Tensor:
        """What belongs to a part of something by block."""
        raise NotImplementedError

    def removed(self) -> Tensor:
        raise NotImplementedError

    def _is_gone(self, gram: Tensor) -> Tensor:
        r = gram.diagonal(dim1=1, dim2=2)[:, 1:].clamp(min=0)
        return (r <= self.work.options.floor**2 * gram[:, :1, 0].clamp(min=0)).all(1)


class Numbered(Blocks):
    """Blocks over any parts."""

    def __init__(self, work: Work, parts: Sequence[Part], count: int) -> None:
        super().__init__(work, parts)
        self.count = count

    def by_part(self) -> Tensor:
        return self._products(self.parts)

    def _products(self, parts: Sequence[Part]) -> Tensor:
        work = self.work

        def columns(part: Part) -> list[Any]:
            return [work.target.flat(part), *(flat_of(v.get(part.name), part.boxes) for v in work.vectors)]

        found = part_products(parts, columns, work.count, work.parameters)
        if not bool(torch.isfinite(found).all()):
            raise NotFinite
        return found

    def measure(self, parts: Sequence[Part]) -> Tensor:
        work, found = self.work, self._products(parts)
        if len(parts) == len(self.parts) and not len(self.factors):
            self.before = found
        gram = torch.zeros(self.count, work.count, work.count, dtype=torch.float64)
        return gram.index_add_(0, torch.tensor([p.block for p in parts]), found)

    def begin(self, gram: Tensor, factors: Tensor) -> None:
        self.factors = factors
        self.vanished = int(self._is_gone(gram).sum())

    def of(self, part: Part, by_block: Tensor) -> Tensor:
        return by_block[part.block]

    def removed(self) -> Tensor:
        if not self.parts:
            return torch.zeros(0, dtype=torch.float64)
        return energy(self.before, self.factors[[part.block for part in self.parts]])


class ByRow(Blocks):
    """Every row of every part is a block; ranks have rows of their own."""

    def by_part(self) -> Tensor:
        return over_all_rows(self._rows(self.parts), self.parts, self.work.parameters)

    def _rows(self, parts: Sequence[Part]) -> list[Tensor]:
        work = self.work

        def columns(part: Part) -> list[Any]:
            return [work.target.rows(part), *(rows_of(v.get(part.name), part.boxes) for v in work.vectors)]

        return row_blocks(parts, columns, work.count, work.parameters)

    def measure(self, parts: Sequence[Part]) -> Tensor:
        work, rows = self.work, self._rows(parts)
        if not len(self.factors):
            wrong = [(~torch.isfinite(r)).flatten(1).any(1) for r in rows]
            self.before = over_all_rows(rows, parts, work.parameters)
            if over_all_rows(wrong, parts, work.parameters).any():  # all ranks raise, or none
                raise NotFinite
            ends = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).tolist()
            self.spans = {part: slice(a, b) for part, a, b in zip(parts, ends, ends[1:], strict=False)}
            self.total = ends[-1]
        gram = torch.zeros(self.total, work.count, work.count, dtype=torch.float64)
        for part, found in zip(parts, rows, strict=True):
            gram[self.spans[part]] = found
        return gram

    def begin(self, gram: Tensor, factors: Tensor) -> None:
        self.factors, self._energy = factors, energy(gram, factors)
        gone = self._is_gone(gram)
        counts = over_all_rows([gone[self.spans[p]] for p in self.parts], self.parts, self.work.parameters)
        self.vanished = int(counts.sum())

    def of(self, part: Part, by_block: Tensor) -> Tensor:
        return by_block[self.spans[part]]

    def removed(self) -> Tensor:
        if not self.parts:
            return torch.zeros(0, dtype=torch.float64)
        return over_all_rows([self._energy[self.spans[p]] for p in self.parts], self.parts, self.work.parameters)


def energy(gram: Tensor, factors: Tensor) -> Tensor:
    """Squared norm of ``sum_k factors[k] * vectors[k]``, by block."""
    return torch.einsum("bi,bij,bj->b", factors, gram[:, 1:, 1:], factors).clamp(min=0)
