"""Regions: immutable sets of parameter entries with set algebra."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from gradsurgery.anatomy.entries import Entries, Tree
from gradsurgery.anatomy.groups import Slice
from gradsurgery.anatomy.space import ParameterSpace, require_same_space
from gradsurgery.errors import SelectionError


class Region:
    """A set of parameter entries of one model, down to single entries.

    Regions combine with ``|``, ``&``, ``-``, ``~``, compare with ``==`` and ``in`` (``a in b``: ``a`` is a subset of
    ``b``; ``"name" in b``: ``b`` holds entries of that parameter), and never change.

    Args:
        space: The model's parameter space.
        entries: Entries by parameter name, canonical or tied alias.
        text: Short form that configs and artefacts store.

    Raises:
        SelectionError: a name the model does not have, or regions of different models combined.

    Example:
        >>> import torch, gradsurgery as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> first = gs.region(model, "0.*")
        >>> first.numel(), (~first).numel(), round(first.fraction, 3)
        (20, 10, 0.667)
        >>> "0.bias" in first, ~first in first
        (True, False)
    """

    def __init__(self, space: ParameterSpace, entries: Mapping[str, Entries], text: str = "") -> None:
        self.space = space
        merged: dict[str, Entries] = {}
        for name, part in entries.items():
            name = space.canonical(name)
            if part.shape != space.shapes[name]:
                raise SelectionError(f"{name} is {list(space.shapes[name])}, the entries are of {list(part.shape)}.")
            merged[name] = merged[name] | part if name in merged else part
        order = [name for name in space.shapes if merged.get(name)]
        self._entries = {name: merged[name] for name in order}
        self.text = text

    @property
    def entries(self) -> dict[str, Entries]:
        """Entries by canonical parameter name, in the model's order."""
        return self._entries

    @classmethod
    def whole(cls, space: ParameterSpace) -> Region:
        return cls(space, {name: Entries.full(shape) for name, shape in space.shapes.items()}, "all")

    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that have entries in the region."""
        return tuple(self.entries)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Disjoint ``(name, {dim: indices})`` that make up the region; dimensions that are not named are whole."""
        return tuple((name, part) for name, entries in self.entries.items() for part in entries.slices())

    @cached_property
    def _numel(self) -> int:
        return sum(part.numel() for part in self.entries.values())

    def numel(self) -> int:
        """Number of entries."""
        return self._numel

    @property
    def fraction(self) -> float:
        """Share of the model's parameters."""
        return self.numel() / max(self.space.numel(), 1)

    @property
    def digest(self) -> str:
        """8 hex digits of the entries, for regions that have no text form."""
        text = repr([(name, _spelled(part.tree)) for name, part in self.entries.items()])
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def of(self, name: str) -> Entries:
        """The entries of one parameter (empty if it has none)."""
        name = self.space.canonical(name)
        return self.entries.get(name) or Entries.empty(self.space.shapes[name])

    def _combine(self, other: Region, symbol: str) -> Region:
        require_same_space(other.space, self.space, f"region {other.text or 'given'}")
        out = {}
        for name in {**self.entries, **other.entries}:
            a, b = self.of(name), other.of(name)
            out[name] = a | b if symbol == "|" else a & b if symbol == "&" else a - b
        return Region(self.space, out, _join(self.text, symbol, other.text))

    def __or__(self, other: Region) -> Region:
        return self._combine(other, "|")

    def __and__(self, other: Region) -> Region:
        return self._combine(other, "&")

    def __sub__(self, other: Region) -> Region:
        return self._combine(other, "-")

    def __invert__(self) -> Region:
        out = Region.whole(self.space)._combine(self, "-")
        out.text = f"~({self.text})" if " " in self.text else f"~{self.text}" if self.text else ""
        return out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region):
            return NotImplemented
        return not self.space.difference(other.space) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(tuple(self.entries.items()))

    def __contains__(self, item: object) -> bool:
        if isinstance(item, Region):
            return not (item - self).numel()
        return isinstance(item, str) and self.space.canonical(item) in self.entries

    def __bool__(self) -> bool:
        return self.numel() > 0

    def __repr__(self) -> str:
        share = f"{self.numel():,} entries, {100 * self.fraction:.2f}% of {self.space.model}"
        return f"{type(self).__name__}({self.text or 'unnamed'}: {share})"


def bracketed(text: str) -> str:
    """A text form that can be indexed: unions, differences and complements in brackets."""
    return f"({text})" if any(symbol in text for symbol in (" | ", " & ", " - ")) or text.startswith("~") else text


def _join(left: str, symbol: str, right: str) -> str:
    """Text of ``left symbol right``; anything but a chain of unions from the left is put in brackets."""
    if not left or not right:
        return ""
    if symbol == "|" and not any(s in left + right for s in (" & ", " - ")):
        return f"{left} | ({right})" if " | " in right else f"{left} | {right}"
    return f"({left}) {symbol} ({right})"


def _spelled(tree: Tree) -> Any:
    """Bit sets in hexadecimal: Python writes no longer decimals than 4,300 digits."""
    return tree if isinstance(tree, bool) else [(hex(bits), _spelled(sub)) for bits, sub in tree]
