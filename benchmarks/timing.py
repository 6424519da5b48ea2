"""Interleaved timing: every run of a candidate between two of the baseline, ratios pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Ratio:
    """Ratios of a candidate's time to the mean of the baseline runs before and after it."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.values, n=4)
        return low, high


def seconds(run: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    baseline: Callable[[], None], candidates: Mapping[str, Callable[[], None]], pairs: int = 25, warmup: int = 2
) -> tuple[dict[str, Ratio], float]:
    """Time candidates against a baseline on a machine whose speed drifts.

    Args:
        baseline: One run of the baseline.
        candidates: One run of each candidate, by name.
        pairs: Counted runs of each candidate, each between two runs of the baseline.
        warmup: Runs of each that are not counted: memory that was idle for long is slow at first.

    Returns:
        The ratios by candidate, and the median seconds of the baseline.
    """
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    stock: list[float] = []
    with tqdm(total=len(candidates) * (warmup + pairs), unit="run") as bar:
        for name, candidate in candidates.items():
            bar.set_description(name)
            before = seconds(baseline)
            for k in range(warmup + pairs):
                taken, after = seconds(candidate), seconds(baseline)
                if k >= warmup:
                    ratios[name].append(2 * taken / (before + after))
                    stock.append(after)
                before = after
                bar.update()
    return {name: Ratio(values) for name, values in ratios.items()}, statistics.median(stock)
