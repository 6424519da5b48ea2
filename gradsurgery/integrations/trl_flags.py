"""Which rollouts are flagged: told by reward functions, asked of detectors, or read off the data set."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.errors import BatchError, PlanError

Detector = Callable[..., Sequence[bool]]
"""Called as reward functions are: ``detector(prompts=…, completions=…, completion_ids=…, **columns)``; a flag a row."""


class RolloutFlags:
    """Label columns of rollouts, in the order in which they were generated.

    A column comes from its detector, or else from a reward function that calls ``log_extra(column, flags)``, or else
    from the data set's column of that name, which a rollout function may also have filled.

    Args:
        columns: The label columns that a method reads.
        detectors: A function by column, or the name of a data set's column.
        numbers: Columns of whole numbers, for metrics and scores; told or read like the others.

    Raises:
        PlanError: a detector for a column that the method does not read, or something that is none.
    """

    def __init__(
        self,
        columns: Collection[str],
        detectors: Mapping[str, Detector | str] | None = None,
        numbers: Collection[str] = (),
    ) -> None:
        self.columns, self.detectors = tuple(sorted(columns)), dict(detectors or {})
        self.numbers = tuple(numbers)
        for name, detector in self.detectors.items():
            if name not in self.columns:
                known = ", ".join(map(repr, self.columns)) or "none"
                raise PlanError(f"flags names {name!r}, which the method does not read; its label columns are {known}.")
            if not callable(detector) and not isinstance(detector, str):
                raise PlanError(f"flags[{name!r}] is a function of rollouts or the name of a column, not {detector!r}.")
        self.told: dict[str, list[Any]] = {}
        self.rewards: list[list[Any]] = []
        self.counts = dict.fromkeys(self.columns, (0, 0))
        self.listening = False

    def heard(self, reward_functions: Any) -> list[Any]:
        """The reward functions, listened to; models and names of models stay as they are."""
        given = list(reward_functions) if isinstance(reward_functions, list | tuple) else [reward_functions]
        out = [f if isinstance(f, str | nn.Module) or not callable(f) else self._wrapped(f) for f in given]
        self.listening = any(new is not old for new, old in zip(out, given, strict=True))
        if not self.listening and (asked := [name for name, d in self.detectors.items() if callable(d)]):
            raise PlanError(f"flags[{asked[0]!r}] is called beside a reward function, and there is none but models.")
        return out

    def _wrapped(self, function: Any) -> Any:
        plain = function
        while isinstance(plain, functools.partial):
            plain = plain.func
        out = self._listening_to(function, plain)
        out.__name__ = getattr(plain, "__name__", type(plain).__name__)  # by which TRL logs it
        return out

    def _listening_to(self, function: Any, plain: Any) -> Any:
        if inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(type(plain).__call__):

            async def awaited(**given: Any) -> Any:
                return self._rewarded(function, await function(**self._told_by(given)))

            return awaited

        def called(**given: Any) -> Any:
            return self._rewarded(function, function(**self._told_by(given)))

        return called

    def _told_by(self, given: dict[str, Any]) -> dict[str, Any]:
        """A reward function's arguments, with our ears at its side output; the first one also brings the detectors."""
        if not self.rewards:
            public = {k: v for k, v in given.items() if k not in ("log_extra", "log_metric")}
            for name, detector in self.detectors.items():
                if callable(detector):
                    self.told.setdefault(name, list(detector(**public)))
        log = given.get("log_extra")

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if column in (*self.columns, *self.numbers) and column not in self.detectors:
                self.told.setdefault(column, []).extend(values)
            if log is not None:
                log(column, values)

        return {**given, "log_extra": log_extra}

    def _rewarded(self, function: Any, rewards: Sequence[float | None]) -> Sequence[float | None]:
        name = getattr(function, "__name__", type(function).__name__)
        if wrong := [r for r in rewards if r is not None and math.isinf(float(r))]:
            raise BatchError(
                f"reward function {name!r} returned {wrong[0]}: no advantage can be computed from it; return None for "
                f"rollouts that have no reward."
            )
        self.rewards.append([math.nan if r is None else float(r) for r in rewards])
        return rewards

    def new_batch(self) -> None:
        self.told.clear()
        self.rewards.clear()

    def require_rewards(self) -> None:
        """Raise where no rollout at all has a reward: such a step would move weights by decay and momentum alone."""
        if self.rewards and all(math.isnan(r) for rewards in self.rewards for r in rewards):
            raise BatchError(
                "every reward of this generation batch is nan or None, so there is nothing to learn from; single "
                "rollouts without a reward are left out by the trainer."
            )

    def tensors(self, rows: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
        """All columns of a generation batch, bool or whole numbers ``[rollouts]``.

        Raises:
            BatchError: nobody said, or what was said are not as many flags as rollouts.
        """
        out = {name: self._flags(name, rows).to(device) for name in self.columns}
        for name in self.numbers:
            values = self._said(name, rows, "what kind of rollout each is", "numbers")
            if wrong := [v for v in values if not isinstance(v, bool | int)]:
                raise BatchError(f"column {name!r} tells rollouts apart by whole numbers, not by {wrong[0]!r}.")
            out[name] = torch.tensor([int(v) for v in values], device=device)
        return out

    def _said(self, column: str, rows: Sequence[Mapping[str, Any]], what: str, those: str) -> list[Any]:
        source = self.detectors.get(column)
        name = source if isinstance(source, str) else column
        found: Any = self.told.get(column)
        if found is None and rows and all(name in row for row in rows):
            found = [row[name] for row in rows]
        if found is None:
            given = f"give flags={{{column!r}: function}}, " if column in self.columns else ""
            raise BatchError(
                f"nobody said {what} in {column!r}: {given}let a reward function call log_extra({column!r}, {those}), "
                f"or add a column {name!r} of them to the data set."
            )
        values = [v.item() if isinstance(v, Tensor) and not v.dim() else v for v in found]
        if len(values) != len(rows):
            raise BatchError(f"column {column!r} has {len(values)} {those} for {len(rows)} rollouts.")
        return values

    def _flags(self, column: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        values = self._said(column, rows, "which rollouts are flagged", "flags")
        if wrong := [v for v in values if not isinstance(v, bool | int) or v not in (0, 1)]:
            raise BatchError(f"label column {column!r} flags rollouts by True and False, not by {wrong[0]!r}.")
        flagged, total = self.counts[column]
        self.counts[column] = flagged + sum(map(bool, values)), total + len(values)
        return torch.tensor([bool(v) for v in values], dtype=torch.bool)

    def shares(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The share of rollouts flagged since the last call, by column; ``summed`` adds up over ranks."""
        if not self.columns:
            return {}
        counts = summed(torch.tensor([self.counts[name] for name in self.columns])).tolist()
        self.counts = dict.fromkeys(self.columns, (0, 0))
        return {f"flagged/{name}": k / total for name, (k, total) in zip(self.columns, counts, strict=True) if total}
