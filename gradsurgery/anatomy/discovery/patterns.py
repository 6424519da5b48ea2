"""Patterns of a twin at real size: exchange classes, groups of heads, rows of neurons."""

from __future__ import annotations

import numpy as np

from gradsurgery.errors import AnatomyError

from .draft import Draft
from .layout import lengths_of, runs_of, starts_in


def neuron_rows(rows: np.ndarray, small: int, real: int, units: int) -> np.ndarray:
    """Rows of the neurons of one expert at real size: adjacent runs stay adjacent, halves stay halves."""
    width = rows.shape[1]
    count, left = divmod(real, small // units)
    if left or width * units != small:
        raise AnatomyError(f"{real} entries do not divide into neurons of {width} rows")
    owner = np.full(small, -1)
    owner[rows] = np.arange(units)[:, None]
    runs = runs_of(small, {"n": owner}, {})
    starts, _ = starts_in(runs, lengths_of(runs), {"n": count}, {})
    parts = [starts[p][:, None] + np.arange(n) for p, n in lengths_of(runs).items()]
    return np.sort(np.concatenate(parts, axis=1), axis=1)


def classes_at(draft: Draft, count: int, parents: tuple[int, ...] | None) -> tuple[int, ...]:
    """Exchange classes at real size, by the pattern they show in the twin."""
    classes = draft.classes or (0,) * draft.count
    if len(set(classes)) == 1:
        return (0,) * count
    if parents is not None and classes == draft.parent_units:
        return parents
    if len(set(classes)) == draft.count:
        return tuple(range(count))
    number = len(set(classes))
    if draft.kind in ("head", "kv_group"):
        number = count * number // draft.count
    return blocks_at(classes, count, number)


def blocks_at(pattern: tuple[int, ...], count: int, number: int) -> tuple[int, ...]:
    """A pattern of equal blocks (or strides) of units, for ``count`` units in ``number`` blocks."""
    small = len(set(pattern))
    units = np.arange(len(pattern))
    if count % number == 0 and len(pattern) % small == 0:
        if tuple(units // (len(pattern) // small)) == tuple(pattern):
            return tuple((np.arange(count) // (count // number)).tolist())
        if tuple(units % small) == tuple(pattern):
            return tuple((np.arange(count) % number).tolist())
    raise AnatomyError(f"the classes {pattern} of the twin have no clear form at {count} units")


def shared_at(mine: np.ndarray, count: int, size: int, real: int) -> np.ndarray | None:
    """Positions that several units share, at real size: those of a group of heads in a block-diagonal projection.

    Groups in a row (``0 0 1 1``) or by turns (``0 1 0 1``), as many units a group as in the twin; where the twin has
    all units, as many groups. ``None`` where every unit has positions of its own.

    Args:
        mine: Index array in the twin ``[units, positions]``.
        count: Units of the real model.
        size: Length of the dimension in the twin.
        real: The same in the real model.
    """
    distinct, labels = np.unique(mine, axis=0, return_inverse=True)
    units, groups = len(mine), len(distinct)
    if groups in (1, units) or not np.array_equal(distinct.ravel(), np.arange(size)):
        return None
    labels, order = labels.ravel(), np.arange(units)
    if units % groups == 0 and np.array_equal(labels, order // (units // groups)):
        wanted = count * groups // units
        place = np.arange(count) // (units // groups if count != units else count // wanted)
    elif np.array_equal(labels, order % groups):
        wanted, place = groups, np.arange(count) % groups
    else:
        return None
    if real % wanted or count % wanted:
        raise AnatomyError(f"{count} units do not share {real} entries as {units} share {size}")
    return np.arange(real).reshape(wanted, -1)[place]
