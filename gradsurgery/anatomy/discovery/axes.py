"""Patterns of named axes as in einops, and sums for unequal parts side by side: ``"(group unit d + group d) hidden"``.

    dimension := axis | "(" sum ")"      sum := product ("+" product)*      product := (axis | "(" sum ")")+

An axis is a name or a number; ``...`` stands for any number of dimensions. The first axis of a product varies slowest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradsurgery.errors import AnatomyError

Sizes = dict[str, int]
_TOKEN = re.compile(r"\s*(\.\.\.|[A-Za-z_]\w*|[1-9]\d*|[()+])")


@dataclass(frozen=True)
class Parts:
    """A sum of products of axes: what one dimension is made of."""

    terms: tuple[tuple[str | int | Parts, ...], ...]

    @property
    def names(self) -> set[str]:
        found: set[str] = set()
        for factor in (f for term in self.terms for f in term):
            found |= factor.names if isinstance(factor, Parts) else {factor} if isinstance(factor, str) else set()
        return found

    def size(self, sizes: Sizes) -> int:
        return sum(math.prod(_size(factor, sizes) for factor in term) for term in self.terms)

    def labels(self, axis: str, sizes: Sizes) -> np.ndarray:
        """Coordinate along ``axis`` of every position, -1 where the axis does not run."""
        return np.concatenate([_product(term, axis, sizes) for term in self.terms])

    def __str__(self) -> str:
        text = " + ".join(" ".join(str(f) for f in term) for term in self.terms)
        return text if len(self.terms) == 1 and len(self.terms[0]) == 1 else f"({text})"


def _size(factor: str | int | Parts, sizes: Sizes) -> int:
    return factor.size(sizes) if isinstance(factor, Parts) else sizes[factor] if isinstance(factor, str) else factor


def _product(term: tuple[str | int | Parts, ...], axis: str, sizes: Sizes) -> np.ndarray:
    found = np.full(1, -1)
    for factor in term:
        if isinstance(factor, Parts):
            own = factor.labels(axis, sizes)
        else:
            count = _size(factor, sizes)
            own = np.arange(count) if factor == axis else np.full(count, -1)
        found = np.maximum(found[:, None], own[None]).reshape(-1)
    return found


@dataclass(frozen=True)
class Pattern:
    """How the dimensions of one tensor are made of axes; ``None`` is the place of ``...``."""

    text: str
    dims: tuple[Parts | None, ...]

    @property
    def names(self) -> set[str]:
        return set().union(*(parts.names for parts in self.dims if parts is not None))

    def over(self, shape: tuple[int, ...], where: str) -> tuple[Parts | None, ...]:
        """One entry a dimension of ``shape``; ``None`` for a dimension that is whole.

        Raises:
            AnatomyError: Another number of dimensions.
        """
        named = len(self.dims) - self.dims.count(None)
        spare = len(shape) - named
        if spare < 0 or (spare and None not in self.dims):
            raise AnatomyError(
                f"{where} has the shape {list(shape)}; the pattern {self.text!r} speaks of {named} dimensions."
            )
        out: list[Parts | None] = []
        for parts in self.dims:
            out.extend([parts] if parts is not None else [None] * spare)
        return tuple(out)


def parse(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        AnatomyError: It is none; the message shows the place.
    """
    tokens, end = [], 0
    while text[end:].strip():
        match = _TOKEN.match(text, end)
        if match is None:
            raise AnatomyError(
                f"{text!r} is no pattern: {text[end:].strip()!r} is neither a name, a number, ( ) nor +."
            )
        tokens.append(match.group(1))
        end = match.end()
    stream = iter([*tokens, ""])
    dims: list[Parts | None] = []
    for token in stream:
        if token == "...":
            dims.append(None)
        elif token:
            dims.append(Parts(((_factor(token, stream, text),),)))
    if not dims or dims.count(None) > 1:
        raise AnatomyError(f"{text!r} is no pattern: it needs a dimension, and `...` at most once.")
    pattern = Pattern(text, tuple(dims))
    for twice in _repeated([p for p in dims if p is not None]):
        raise AnatomyError(f"{text!r}: the axis {twice!r} stands twice in one product; give the second another name.")
    return pattern


def _factor(token: str, stream: Iterator[str], text: str) -> str | int | Parts:
    if token == "(":
        return _sum(stream, text)
    if token in (")", "+", "...", ""):
        raise AnatomyError(f"{text!r} is no pattern: a name or ( was expected where {token or 'it ends'!r} stands.")
    return int(token) if token.isdigit() else token


def _sum(stream: Iterator[str], text: str) -> Parts:
    terms: list[list[str | int | Parts]] = [[]]
    for token in stream:
        if token in (")", "+"):
            if not terms[-1]:
                raise AnatomyError(f"{text!r} is no pattern: an axis is missing before {token!r}.")
            if token == ")":
                return Parts(tuple(map(tuple, terms)))
            terms.append([])
        else:
            terms[-1].append(_factor(token, stream, text))
    raise AnatomyError(f"{text!r} is no pattern: a ) is missing.")


def _repeated(factors: Sequence[str | int | Parts]) -> list[str]:
    """Axes that stand twice along one product."""
    seen: set[str] = set()
    twice: list[str] = []
    for factor in factors:
        if isinstance(factor, Parts):
            twice += [name for term in factor.terms for name in _repeated(term)]
        names = factor.names if isinstance(factor, Parts) else {factor} if isinstance(factor, str) else set()
        twice += sorted(names & seen)
        seen |= names
    return twice


def solve(places: Sequence[tuple[Parts, int, str]], given: Sizes) -> Sizes:
    """Sizes of all axes from the sizes of the dimensions they make up.

    Args:
        places: ``(parts, size of the dimension, what to call it in an error)``.
        given: Sizes that are known beforehand.

    Raises:
        AnatomyError: The sizes do not fit together, or do not follow.
    """
    sizes, left = dict(given), list(places)
    while left:
        open_ = []
        for parts, size, where in left:
            unknown = sorted(parts.names - sizes.keys())
            if len(unknown) > 1:
                open_.append((parts, size, where))
            elif unknown:  # linear in the one unknown, since no product holds an axis twice
                rest = parts.size({**sizes, unknown[0]: 0})
                step = parts.size({**sizes, unknown[0]: 1}) - rest
                value, over = divmod(size - rest, step)
                if over or value < 1:
                    raise _misfit(parts, size, where, sizes)
                sizes[unknown[0]] = value
            elif parts.size(sizes) != size:
                raise _misfit(parts, size, where, sizes)
        if len(open_) == len(left):
            names = sorted(set().union(*(parts.names for parts, _, _ in left)) - sizes.keys())
            raise AnatomyError(
                f"{left[0][2]}: the sizes of {', '.join(names)} do not follow from {left[0][0]} = {left[0][1]}. Give "
                f"one in sizes={{{names[-1]!r}: …}}, as a number or as the name of a config field."
            )
        left = open_
    return sizes


def _misfit(parts: Parts, size: int, where: str, sizes: Sizes) -> AnatomyError:
    known = ", ".join(f"{name}={sizes[name]}" for name in sorted(parts.names & sizes.keys()))
    return AnatomyError(f"{where}: {size} entries do not divide into {parts}{f' with {known}' if known else ''}.")
