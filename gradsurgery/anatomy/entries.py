"""Exact sets of tensor entries, as small canonical trees of bit sets.

A set of entries of a tensor ``[n0, n1, …]`` groups the indices of dimension 0 by what they hold in the remaining
dimensions: a tuple of ``(bits, subset)``, ``bits`` a Python int whose bit ``i`` stands for index ``i``. Equal subsets
are merged and parts are ordered by their lowest bit, so that equal sets are equal values; the sets that surgery meets
(rows, columns, blocks, their unions and complements) have one to a few parts whatever the size of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch

Tree = tuple | bool
Box = tuple[int, ...]
"""One bit set per dimension: the product of the index sets."""


def all_bits(size: int) -> int:
    return (1 << size) - 1


def bits_of(indices: Iterable[int] | np.ndarray, size: int) -> int:
    """The bit set of some indices of a dimension of ``size``."""
    array = np.asarray(list(indices) if not isinstance(indices, np.ndarray) else indices, dtype=np.int64).reshape(-1)
    if array.size and (array.min() < 0 or array.max() >= size):
        raise IndexError(f"indices {array.min()}..{array.max()} do not fit a dimension of {size}")
    mask = np.zeros(size, dtype=np.uint8)
    mask[array] = 1
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


def indices_of(bits: int) -> np.ndarray:
    """The sorted indices of a bit set, int64."""
    raw = np.frombuffer(bits.to_bytes((bits.bit_length() + 7) // 8 or 1, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little"))


def span_of(bits: int) -> tuple[int, int] | None:
    """``(start, stop)`` where the bits are one contiguous run, else None."""
    if not bits:
        return None
    start = (bits & -bits).bit_length() - 1
    run = bits >> start
    return (start, start + run.bit_length()) if run & (run + 1) == 0 else None


def _combine(a: Tree, b: Tree, shape: tuple[int, ...], op: Callable[[bool, bool], bool]) -> Tree:
    if not shape:
        return op(bool(a), bool(b))
    everything = all_bits(shape[0])
    parts: dict[Tree, int] = {}
    for bits_a, sub_a in _parts(a, everything):
        for bits_b, sub_b in _parts(b, everything):
            if shared := bits_a & bits_b:
                sub = _combine(sub_a, sub_b, shape[1:], op)
                if sub:
                    parts[sub] = parts.get(sub, 0) | shared
    return tuple(sorted(((bits, sub) for sub, bits in parts.items()), key=lambda part: part[0] & -part[0]))


def _parts(tree: Tree, everything: int) -> Iterator[tuple[int, Tree]]:
    rest = everything
    for bits, sub in tree or ():  # type: ignore[union-attr]
        rest &= ~bits
        yield bits, sub
    if rest:
        yield rest, ()


class Entries:
    """An immutable set of entries of one tensor.

    >>> rows = Entries.box((4, 3), {0: [0, 1]})
    >>> column = Entries.box((4, 3), {1: [2]})
    >>> (rows | column).numel(), (rows & column).numel(), (~rows).numel()
    (8, 2, 6)
    >>> rows - column == rows & ~column
    True
    """

    __slots__ = ("_hash", "shape", "tree")

    def __init__(self, shape: tuple[int, ...], tree: Tree) -> None:
        self.shape, self.tree = shape, tree
        self._hash: int | None = None

    @classmethod
    def full(cls, shape: tuple[int, ...]) -> Entries:
        return cls.from_box(shape, tuple(all_bits(n) for n in shape))

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Entries:
        return cls(shape, () if shape else False)

    @classmethod
    def from_box(cls, shape: tuple[int, ...], box: Box) -> Entries:
        tree: Tree = True
        for bits in reversed(box):
            tree = ((bits, tree),) if bits and tree else ()
        return cls(shape, tree)

    @classmethod
    def box(cls, shape: tuple[int, ...], index: Mapping[int, Iterable[int] | np.ndarray]) -> Entries:
        """The product of index sets; dimensions that are not named are whole."""
        bits = (bits_of(index[d], n) if d in index else all_bits(n) for d, n in enumerate(shape))
        return cls.from_box(shape, tuple(bits))

    def _op(self, other: Entries, op: Callable[[bool, bool], bool]) -> Entries:
        if self.shape != other.shape:
            raise ValueError(f"entries of a tensor {self.shape} and of a tensor {other.shape} cannot be combined")
        return Entries(self.shape, _combine(self.tree, other.tree, self.shape, op))

    def __or__(self, other: Entries) -> Entries:
        return self._op(other, lambda a, b: a or b)

    def __and__(self, other: Entries) -> Entries:
        return self._op(other, lambda a, b: a and b)

    def __sub__(self, other: Entries) -> Entries:
        return self._op(other, lambda a, b: a and not b)

    def __invert__(self) -> Entries:
        return Entries.full(self.shape) - self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and self.shape == other.shape and self.tree == other.tree

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.shape, self.tree))
        return self._hash

    def __bool__(self) -> bool:
        return bool(self.tree)

    @property
    def whole(self) -> bool:
        return self.tree == Entries.full(self.shape).tree

    def numel(self) -> int:
        def count(tree: Tree) -> int:
            return int(tree) if isinstance(tree, bool) else sum(bits.bit_count() * count(sub) for bits, sub in tree)

        return count(self.tree)

    def boxes(self) -> list[Box]:
        """Disjoint boxes that make up the set."""

        def walk(tree: Tree) -> Iterator[Box]:
            if isinstance(tree, bool):
                if tree:
                    yield ()
                return
            for bits, sub in tree:
                for rest in walk(sub):
                    yield (bits, *rest)

        return list(walk(self.tree))

    def slices(self) -> list[dict[int, tuple[int, ...]]]:
        """The boxes as ``{dim: indices}``, whole dimensions left out."""
        return [
            {d: tuple(indices_of(b).tolist()) for d, b in enumerate(box) if b != all_bits(self.shape[d])}
            for box in self.boxes()
        ]

    def mask(self) -> torch.Tensor:
        """The set as a bool tensor of the tensor's shape."""
        out = torch.zeros(self.shape, dtype=torch.bool)
        for box in self.boxes():
            if not box:
                return out.fill_(True)
            out[np.ix_(*[indices_of(bits) for bits in box])] = True
        return out

    def __repr__(self) -> str:
        return f"Entries(shape={self.shape}, numel={self.numel()}, boxes={len(self.boxes())})"
