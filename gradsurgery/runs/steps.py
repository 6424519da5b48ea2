"""The rows of each optimizer step, one after the other, so that a Trainer on any number of ranks sees them in order."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from gradsurgery.data import MixedSampler, Rows, collate
from gradsurgery.errors import PlanError
from gradsurgery.surgery import Method, Pass


class OrderedRows(Dataset[Any]):
    """The rows of a sampler's batches.

    Attributes:
        size: Items of a step.
        context: Tokens of a row, a mean where they differ.
    """

    def __init__(self, rows: Rows, sampler: MixedSampler, steps: int) -> None:
        self.rows, self.sampler, self.steps = rows, sampler, steps
        self.size = len(sampler.indices(0))
        self.context = rows.context

    def __len__(self) -> int:
        return self.steps * self.size

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, k = divmod(index, self.size)
        return self.rows[self.sampler.indices(step)[k]]

    def collate(self, items: Sequence[Any]) -> Any:
        return collate(items)

    def rows_of(self, p: Pass, steps: int) -> float:
        """Rows a step that a pass forwards when it runs, a mean over the first ``steps``."""
        if p.rows is None:
            return float(self.size)
        chosen = [i for step in range(steps) for i in self.sampler.indices(step)]
        flags = getattr(self.rows, p.rows.removeprefix("~"))[chosen].float().mean().item()
        return self.size * (1 - flags if p.rows.startswith("~") else flags)


class OrderedStreams(Dataset[Any]):
    """Steps of several streams, each with rows and a sampler of its own: ``{"private": …, "public": …}``.

    An item holds an equal share of the step's rows of every stream, as few as there can be. The rows of stream ``None``
    are the batch itself, and the others stand beside them.
    """

    def __init__(self, streams: Mapping[Any, OrderedRows]) -> None:
        self.streams: dict[str | None, OrderedRows] = {**streams}
        sizes = [stream.size for stream in self.streams.values()]
        self.steps = min(stream.steps for stream in self.streams.values())
        self.size = math.gcd(*sizes)
        self.context = max(stream.context for stream in self.streams.values())

    def __len__(self) -> int:
        return self.steps * self.size

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {
            name: [stream[row] for row in range(*self._span(stream, index))] for name, stream in self.streams.items()
        }

    def _span(self, stream: OrderedRows, index: int) -> tuple[int, int]:
        share = stream.size // self.size
        return index * share, (index + 1) * share

    def collate(self, items: Sequence[Any]) -> Any:
        batches = {name: collate([row for item in items for row in item[name]]) for name in self.streams}
        return {**batches.pop(None, {}), **batches}

    def rows_of(self, p: Pass, steps: int) -> float:
        """Rows a step that a pass forwards when it runs, a mean over the first ``steps``."""
        if p.stream not in self.streams:
            raise PlanError(
                f"pass {p.name!r} reads stream {p.stream!r}; there are {', '.join(map(str, self.streams))}."
            )
        return self.streams[p.stream].rows_of(p, steps)


Steps = OrderedRows | OrderedStreams


def tokens_a_step(method: Method, data: Steps, first: int = 200) -> tuple[float, float]:
    """Tokens that a step trains on, every pass counted, and tokens that references only forward; means over ``first``.

    A pass counts in the steps in which its schedule runs it, with the rows that it takes.
    """
    steps = min(first, data.steps)
    trained = forwarded = 0.0
    for p in method.passes:
        share = 1.0
        if p.when is not None:
            peers = [q for q in method.passes if q.when == p.when]
            share = sum(p.when.runs(step, peers.index(p), len(peers)) for step in range(steps)) / steps
        tokens = share * data.rows_of(p, steps) * data.context
        trained += tokens
        forwarded += tokens * len(p.refs)
    return trained, forwarded


def rows_a_rank(size: int, accumulation: int) -> int:
    """Items of a micro-batch on one rank: ranks and micro-batches share the batch that one process would see."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if size % (ranks * accumulation):
        raise PlanError(
            f"{size} rows a step cannot be shared by {ranks} ranks of {accumulation} micro-batches each; "
            f"choose rows a multiple of {ranks * accumulation}."
        )
    return size // (ranks * accumulation)
