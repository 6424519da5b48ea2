"""Rows of a module's input by flags: classes of rows that are treated alike, and cheap ways to take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsurgery.tensors import Indices


@dataclass(frozen=True)
class Rows:
    """Some of ``count`` rows: none, all, one contiguous ``span``, or an ``index``."""

    count: int
    span: tuple[int, int] | None
    index: Tensor | None = None

    @property
    def none(self) -> bool:
        return self.span is not None and self.span[0] == self.span[1]

    @property
    def all(self) -> bool:
        return self.span == (0, self.count)

    def take(self, x_NC: Tensor) -> Tensor:
        """The rows of ``x_NC``: a view where they are contiguous."""
        if self.span is not None:
            return x_NC if self.all else x_NC.narrow(0, self.span[0], self.span[1] - self.span[0])
        assert self.index is not None
        return x_NC.index_select(0, self.index)

    def fill_(self, x_NC: Tensor, columns: Indices, value: float) -> None:
        """``x_NC[rows, columns] = value`` in place."""
        if self.none:
            return
        if self.span is not None and columns.span is not None:
            columns.narrow(self.take(x_NC), 1).fill_(value)
        elif self.span is not None:
            self.take(x_NC).index_fill_(1, columns.index_on(x_NC.device), value)
        elif columns.span is not None:
            columns.narrow(x_NC, 1).index_fill_(0, self.index, value)  # type: ignore[arg-type]
        else:
            x_NC[self.index[:, None], columns.index_on(x_NC.device)[None]] = value  # type: ignore[index]


def rows_of(mask: Tensor, device: torch.device) -> Rows:
    """The rows that a bool vector on the host flags."""
    index = mask.nonzero().flatten()
    count, found = mask.numel(), index.numel()
    if found == 0:
        return Rows(count, (0, 0))
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == found:
        return Rows(count, (first, last + 1))
    return Rows(count, None, index.to(device))


@dataclass
class RowClasses:
    """Rows grouped by which of a program's label columns flag them.

    Bit ``w`` of a class code says that column ``w`` flags the row.

    Attributes:
        count: Number of rows.
        codes: Codes that occur, ascending.
    """

    count: int
    codes: tuple[int, ...]
    device: torch.device
    _code_N: Tensor | None = None
    _cache: dict[frozenset[int], Rows] = field(default_factory=dict)
    _scratch: dict[tuple[torch.Size, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def plain(cls, count: int, device: torch.device) -> RowClasses:
        return cls(count, (0,) if count else (), device)

    @classmethod
    def of(cls, flags_WN: Tensor, device: torch.device) -> RowClasses:
        """Classes of ``[columns, rows]`` bool flags (moved to the host: one synchronisation a pass)."""
        code_N = torch.zeros(flags_WN.shape[1], dtype=torch.long)
        for w, flags_N in enumerate(flags_WN.cpu()):
            code_N |= flags_N.long() << w
        return cls(flags_WN.shape[1], tuple(code_N.unique().tolist()), device, code_N)

    def scratch(self, x: Tensor) -> Tensor:
        """A copy of ``x`` that lasts until the next one of its shape: one buffer for all layers of a pass."""
        key = (x.shape, x.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty_like(x)
        return self._scratch[key].copy_(x)

    def rows(self, wanted: Callable[[int], bool]) -> Rows:
        """The rows whose class code is wanted."""
        codes = frozenset(code for code in self.codes if wanted(code))
        if codes not in self._cache:
            if len(codes) == len(self.codes):
                found = Rows(self.count, (0, self.count))
            elif not codes:
                found = Rows(self.count, (0, 0))
            else:
                assert self._code_N is not None
                found = rows_of(torch.isin(self._code_N, torch.tensor(sorted(codes))), self.device)
            self._cache[codes] = found
        return self._cache[codes]
