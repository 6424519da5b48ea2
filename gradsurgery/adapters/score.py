"""Scores that gate: how far a row's gradient goes along a direction, against a threshold that follows the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gradsurgery.errors import ArtefactError, BatchError, PlanError
from gradsurgery.estimators.direction import Direction

By = Literal["sequence", "token", "rollout"]


@dataclass(frozen=True)
class Quantile:
    """The ``q``-quantile of recent scores, weighted by ``0.5 ** (age / halflife)``; ages count what was scored since.

    Args:
        q: Share of the weight that lies at or below the threshold.
        halflife: In scored sequences (tokens, rollouts).
        warmup: Nothing is flagged before so many were scored.
    """

    q: float = 0.9
    halflife: float = 96.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.q < 1:
            raise PlanError(f"Quantile: q lies between 0 and 1; {self.q!r} does not.")
        if not 0 < self.halflife < math.inf or self.warmup < 0:
            raise PlanError(f"Quantile: halflife is above 0, warmup from 0 on, not {self.halflife!r}, {self.warmup!r}.")

    @property
    def size(self) -> int:
        """How many are remembered: eight half-lives, 99.6% of the weight."""
        return max(math.ceil(8 * self.halflife), self.warmup)

    def of(self, scores_N: Tensor) -> float:
        """The threshold for scores, oldest first; infinite while warming up."""
        count = scores_N.numel()
        if not count or count < self.warmup:
            return math.inf
        order = torch.argsort(scores_N, stable=True)
        age_N = torch.arange(count - 1, -1, -1, device=scores_N.device, dtype=torch.float64)
        weight_N = (0.5 ** (age_N / self.halflife))[order]
        share_N = weight_N.cumsum(0) / weight_N.sum()
        found = int(torch.searchsorted(share_N, self.q).clamp(max=count - 1))
        return float(scores_N[order[found]])


class Score:
    """Flags rows whose gradient points along a direction: ``cos(f_b, v) > threshold``.

    ``f_b`` is the gradient by example in adapter coordinates, all layers of the direction together; ``v`` stacks the
    direction's first axis of every layer, each of norm one. Rows without a gradient (no loss token, no advantage) score
    0, are never flagged and not remembered. Under several ranks thresholds are of all ranks' rows.

    Args:
        direction: From `gs.estimators.paired_direction`.
        threshold: A cosine, or `Quantile`. The buffer holds raw gradients and is scored against the direction as it is,
            so that a refreshed one (``score.direction = …``) needs no new buffer.
        by: One score a ``"sequence"``, a ``"token"``, or a ``"rollout"``: all rows with one number in ``rollout``.
        rollout: Name of the batch's column of whole numbers, ``[batch]``.

    Raises:
        PlanError: an option that does not exist, or a threshold that is no cosine.
        ArtefactError: a direction that is zero everywhere.
    """

    def __init__(
        self,
        direction: Direction,
        threshold: Quantile | float = Quantile(),
        by: By = "sequence",
        rollout: str = "rollout",
    ) -> None:
        if by not in ("sequence", "token", "rollout"):
            raise PlanError(f'Score: by is "sequence", "token" or "rollout", not {by!r}.')
        is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not isinstance(threshold, Quantile) and not (is_number and -1 <= threshold <= 1):
            raise PlanError(f"Score: threshold is a cosine from -1 to 1, or a Quantile, not {threshold!r}.")
        self.threshold, self.by, self.rollout = threshold, by, rollout
        self.state: dict[str, Any] = {}
        self._direction: Direction | None = None
        self.direction = direction

    @property
    def direction(self) -> Direction:
        assert self._direction is not None
        return self._direction

    @direction.setter
    def direction(self, new: Direction) -> None:
        if not isinstance(new, Direction):
            raise PlanError(f"Score takes a direction (gs.estimators.paired_direction), not {type(new).__name__}.")
        new.require_nonzero("Score")
        old = self._direction
        if old is not None and (new.fingerprint != old.fingerprint or new.coordinates != old.coordinates):
            raise ArtefactError("Score: the new direction is of other layers or another adapter than the one before.")
        self._direction = new

    @property
    def grain(self) -> Literal["sequence", "token"]:
        return "token" if self.by == "token" else "sequence"

    def cosines(self, features_NR: Tensor) -> Tensor:
        """``[N]``; 0 for rows without a gradient.

        Raises:
            BatchError: nan or inf.
        """
        if not torch.isfinite(features_NR).all():
            raise BatchError("Score: gradients by example hold nan or inf: the batch does, or training has diverged.")
        v_R = self.direction.stacked.to(features_NR.device, torch.float64)
        # row by row and in fp64: a remembered row has the very score that it had when it was new
        unit = features_NR.double() / features_NR.abs().amax(1, keepdim=True).double().clamp(min=1e-300)
        norm_N = unit.square().sum(1).sqrt()
        return (unit * v_R).sum(1) / torch.where(norm_N > 0, norm_N, 1.0) / v_R.norm()

    def flags(self, features_NR: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Bool by row of the features, and what was measured; remembers the features."""
        flagged, _, figures = self.judge(features_NR, batch)
        return flagged, figures

    def judge(self, features_NR: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """As `flags`, with the cosine of every row beside its flag."""
        groups = None
        if self.by == "rollout":
            groups = self._groups(features_NR, batch)
            count = int(groups.max()) + 1
            features_NR = torch.zeros(count, features_NR.shape[1]).to(features_NR).index_add_(0, groups, features_NR)
        features_NR = features_NR.float()
        scores = self.cosines(features_NR)
        live = features_NR.any(1)
        if isinstance(self.threshold, Quantile):
            buffer = self._remember(features_NR[live], self.threshold.size)
            threshold = self.threshold.of(self.cosines(buffer))
        else:
            threshold = float(self.threshold)
        flagged = (scores > threshold) & live
        figures = {"threshold": threshold, "score": float(scores[live].mean()) if bool(live.any()) else 0.0}
        if groups is not None:
            flagged, scores = flagged[groups], scores[groups]
        return flagged, scores, figures

    def _groups(self, features_NR: Tensor, batch: Mapping[str, Any]) -> Tensor:
        numbers = batch.get(self.rollout)
        if not isinstance(numbers, Tensor) or numbers.is_floating_point() or numbers.shape != features_NR.shape[:1]:
            given = f"{numbers.dtype} {list(numbers.shape)}" if isinstance(numbers, Tensor) else "none"
            raise BatchError(
                f"Score by rollout needs whole numbers [batch] in column {self.rollout!r}; there are {given}."
            )
        return numbers.to(features_NR.device).unique(return_inverse=True)[1]

    def _remember(self, features_NR: Tensor, size: int) -> Tensor:
        """The buffer, oldest first, with all ranks' new rows."""
        new = gathered(features_NR)
        held = self.state.get("features")
        buffer = new if held is None else torch.cat([held.to(new), new])
        self.state["features"] = buffer[-size:].clone()
        return self.state["features"]

    def describe(self) -> str:
        by = "" if self.by == "sequence" else f", by={self.by!r}"
        return f"Score({self.direction.describe()}, {self.threshold!r}{by})"


def gathered(rows_NR: Tensor) -> Tensor:
    """All ranks' rows, in the order of ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows_NR
    counts = [torch.zeros(1, dtype=torch.long, device=rows_NR.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows_NR)], device=rows_NR.device))
    most = max(int(count) for count in counts)
    padded = rows_NR.new_zeros(most, rows_NR.shape[1])
    padded[: len(rows_NR)] = rows_NR
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([rows[: int(count)] for rows, count in zip(found, counts, strict=True)])
