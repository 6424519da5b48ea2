"""Logits in blocks of rows and vocabulary, for work that keeps no second tensor of their size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ENTRIES, WORDS = 1 << 18, 1 << 14
"""Of a block on the CPU, and of one of its rows: what stays in cache (2^15 entries were 1.2 times slower)."""
ENTRIES_ON_DEVICE = 1 << 24


@dataclass(frozen=True)
class Block:
    """Rows ``rows`` of a matrix; whether ``some`` and ``all`` of them count.

    Off the CPU some do and not all, since looking would synchronise.
    """

    rows: slice
    some: bool
    all: bool


class Blocks:
    """How a matrix of logits is cut up, and the memory to work on its parts in.

    Args:
        logits: The tensor, ``[…, vocabulary]``.
        chunk_size: Entries of a block; 0 leaves it to the device.
        buffers: How many blocks of memory the work needs.
        whole_rows: Blocks take the vocabulary as a whole.
    """

    def __init__(self, logits: Tensor, dtype: torch.dtype, chunk_size: int, buffers: int, whole_rows: bool = False):
        on_cpu = logits.device.type == "cpu"
        entries = chunk_size or (ENTRIES if on_cpu else ENTRIES_ON_DEVICE)
        self.vocabulary = logits.shape[-1]
        self.words = self.vocabulary if whole_rows else min(self.vocabulary, WORDS if on_cpu else entries, entries)
        self.rows = max(1, min(entries // max(self.words, 1), logits.shape[:-1].numel()))
        shape = (buffers, self.rows * self.words)
        self.memory = torch.empty(shape, dtype=dtype, device=logits.device)

    def of(self, counted_N1: Tensor) -> Iterator[Block]:
        """The blocks of a matrix whose row ``n`` counts where ``counted_N1[n]``."""
        for start in range(0, counted_N1.shape[0], self.rows):
            rows = slice(start, start + self.rows)
            if counted_N1.device.type == "cpu":
                flags = counted_N1[rows]
                number = int(flags.count_nonzero())
                yield Block(rows, number > 0, number == len(flags))
            else:
                yield Block(rows, True, False)

    def columns(self) -> Iterator[slice]:
        for start in range(0, self.vocabulary, self.words):
            yield slice(start, min(start + self.words, self.vocabulary))

    def buffers(self, like: Tensor) -> list[Tensor]:
        """The memory, in the shape of a part of a block."""
        return [memory[: like.numel()].view(like.shape) for memory in self.memory]


def matrices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors ``[…, X]`` of equal leading dimensions as views ``[row, X]``: all rows at once, or example by example."""
    try:
        yield tuple([x.view(-1, x.shape[-1]) for x in tensors])
    except RuntimeError:  # strides that no view of all rows has
        yield from zip(*(x if x.dim() > 2 else x.unsqueeze(0) for x in tensors), strict=True)
