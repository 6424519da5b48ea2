"""Schedules: when a pass runs. Pure functions of a seed and the optimizer step, equal on all ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gradsurgery.errors import PlanError


class Schedule:
    """Decides whether a pass runs in an optimizer step."""

    def runs(self, step: int, index: int, count: int) -> bool:
        """Whether pass ``index`` of the ``count`` passes under this schedule runs in ``step``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Every(Schedule):
    """What `every` gives: steps ``offset``, ``offset + k``, ``offset + 2 k``, …"""

    k: int
    offset: int = 0

    def runs(self, step: int, index: int, count: int) -> bool:
        return step % self.k == self.offset % self.k


@dataclass(frozen=True)
class SampleOne(Schedule):
    """What `sample_one` gives: of the scheduled passes one a step, drawn from the seed and the step's number."""

    seed: int = 0

    def runs(self, step: int, index: int, count: int) -> bool:
        return random.Random(f"{self.seed}/{step}").randrange(count) == index


@dataclass(frozen=True)
class OnRefresh(Schedule):
    """What `on_refresh` is: in no step, only where ``surgery.refresh`` asks for the slot."""

    def runs(self, step: int, index: int, count: int) -> bool:
        return False


def every(k: int, offset: int = 0) -> Every:
    """Run in every ``k``-th optimizer step, first in step ``offset``.

    >>> [every(3).runs(step, 0, 1) for step in range(4)]
    [True, False, False, True]
    """
    if not isinstance(k, int) or k < 1:
        raise PlanError(f"every takes a positive number of steps, not {k!r}.")
    return Every(k, offset)


def sample_one(seed: int = 0) -> SampleOne:
    """Give the same schedule to several passes: each optimizer step runs exactly one of them, drawn from the seed."""
    return SampleOne(seed)


def on_refresh() -> OnRefresh:
    """Never run by itself: the pass runs in ``surgery.refresh(slot, batches)`` alone, over batches of its own.

    >>> on_refresh().runs(0, 0, 1)
    False
    """
    return OnRefresh()
