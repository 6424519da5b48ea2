"""Forget loss against retain loss along the checkpoints of a training (SGTM, arXiv 2512.05648, figures 1 and 4a).

A method is better where its curve lies further to the left: less retain loss at the same forget loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gradsurgery.errors import DataError

Series = Sequence[tuple[float, float]]


class TradeOff(NamedTuple):
    """A checkpoint: optimizer step, and losses in nats per token."""

    step: float
    forget: float
    retain: float


def trade_off(curves: Mapping[str, Series], forget: str | Iterable[str], retain: str | Iterable[str]) -> list[TradeOff]:
    """Points of every step at which all categories were evaluated, in the order of the steps.

    Args:
        curves: Category -> ``[(step, loss), …]``.
        forget: Category or categories to be removed; several count with equal weight, as in the paper.
        retain: The same for those on the other axis.

    Raises:
        DataError: a category without a curve, or no step that all of them share.

    Example:
        >>> from gradsurgery.evaluation import trade_off
        >>> trade_off({"es": [(1, 8.0), (2, 7.0)], "en": [(1, 6.0), (2, 5.0)]}, forget="es", retain="en")
        [TradeOff(step=1, forget=8.0, retain=6.0), TradeOff(step=2, forget=7.0, retain=5.0)]
    """
    names = {"forget": _names(forget), "retain": _names(retain)}
    for side, wanted in names.items():
        if not wanted:
            raise DataError(f"trade_off: {side} names no category; there are {', '.join(curves) or 'none'}.")
        if missing := [name for name in wanted if name not in curves]:
            have = ", ".join(curves) or "none"
            raise DataError(f"trade_off: no curve of {side} category {missing[0]!r}; there are {have}.")
    by_step = {name: dict(curves[name]) for wanted in names.values() for name in wanted}
    steps = sorted(set.intersection(*(set(of) for of in by_step.values())))
    if not steps:
        raise DataError("trade_off: no step at which every category was evaluated.")

    def mean(side: str, step: float) -> float:
        return sum(by_step[name][step] for name in names[side]) / len(names[side])

    return [TradeOff(step, mean("forget", step), mean("retain", step)) for step in steps]


def retain_at(points: Sequence[TradeOff], forget: float) -> float | None:
    """Least retain loss at which a curve has the given forget loss, between checkpoints linearly; ``None``: nowhere.

    Example:
        >>> from gradsurgery.evaluation import retain_at
        >>> from gradsurgery.evaluation.trade_off import TradeOff
        >>> retain_at([TradeOff(1, 8.0, 6.0), TradeOff(2, 7.0, 5.0)], forget=7.5)
        5.5
    """
    found = [p.retain for p in points if p.forget == forget]
    for a, b in itertools.pairwise(points):
        if (a.forget - forget) * (b.forget - forget) < 0:
            share = (forget - a.forget) / (b.forget - a.forget)
            found.append(a.retain + share * (b.retain - a.retain))
    return min(found, default=None)


def retain_gap(points: Sequence[TradeOff], reference: Sequence[TradeOff], levels: int = 33) -> float | None:
    """How far a curve lies left of a reference: mean difference of retain losses over the forget losses both reach.

    Positive: less retain loss than the reference at the same forget loss. ``None`` where they share no forget loss.
    """
    if not points or not reference:
        raise DataError("retain_gap compares two curves with at least one checkpoint each.")
    low = max(min(p.forget for p in of) for of in (points, reference))
    high = min(max(p.forget for p in of) for of in (points, reference))
    if low > high:
        return None
    gaps = []
    for k in range(levels):
        level = min(low + (high - low) * k / max(levels - 1, 1), high)
        mine, other = retain_at(points, level), retain_at(reference, level)
        if mine is not None and other is not None:
            gaps.append(other - mine)
    return sum(gaps) / len(gaps) if gaps else None


def forget_gap(points: Sequence[TradeOff], reference: Sequence[TradeOff], levels: int = 33) -> float | None:
    """How far a curve lies above a reference: mean difference of forget losses over the retain losses both reach.

    Positive: more forget loss than the reference at the same retain loss. ``None`` where they share no retain loss.

    Example:
        >>> from gradsurgery.evaluation import TradeOff, forget_gap
        >>> mine, other = [TradeOff(1, 9.0, 6.0), TradeOff(2, 8.0, 4.0)], [TradeOff(1, 8.0, 6.0), TradeOff(2, 6.0, 5.0)]
        >>> forget_gap(mine, other)                                    # by 1 at 6, by 2.5 at 5, linear between them
        1.75
    """
    mine, other = ([TradeOff(p.step, forget=p.retain, retain=-p.forget) for p in of] for of in (points, reference))
    return retain_gap(mine, other, levels)


def _names(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)
