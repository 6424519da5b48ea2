"""What a quarantine does to each kind of row: the share that it flags, scores, log-probabilities, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.adapters.handle import Handle
from gradsurgery.adapters.route import Route
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.evaluation.by_kind import mean_by_kind, token_log_probabilities


@dataclass(frozen=True)
class Kinds:
    """The column by which rows are told apart in the metrics; it has no part in what is trained.

    A quarantine's metrics then hold ``quarantine/flagged/<kind>`` (the rate of a detector on each kind),
    ``quarantine/score/<kind>`` (the mean cosine to the direction) and ``quarantine/log_probability/<kind>`` (of a
    token, in nats), of the step's last micro-batch.

    Args:
        column: Name of a column ``[batch]`` of whole numbers: forget or retain, student or teacher. (Columns of bools
            are labels, which losses do not see.)
        names: Name of kind 0, 1, …; by default the numbers.

    Example:
        >>> adapter = gs.adapters.add(model, "q_proj", rank=4)
        >>> kinds = gs.adapters.Kinds("teacher", ("student", "teacher"))
        >>> surgery = gs.attach(
        ...     gs.methods.quarantine(adapter, kinds=kinds), adapter.host, torch.optim.AdamW(adapter.parameters())
        ... )
        >>> rows = {"flag": torch.tensor([True, False]), "teacher": torch.tensor([1, 0])}
        >>> losses = surgery.backward({**batch, **rows})
        >>> surgery.finish()
        >>> surgery.metrics()["quarantine/flagged/teacher"]
        1.0
        >>> surgery.remove(), adapter.remove()
        (None, None)
    """

    column: str = "category"
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise PlanError(f"Kinds takes the name of a column, not {self.column!r}.")


class ByKind:
    """A loss that leaves what each kind of row had in it among the adapter's figures."""

    def __init__(self, loss: Any, adapter: Handle, kinds: Kinds, route: Route | None = None) -> None:
        self.loss, self.adapter, self.kinds, self.route = loss, adapter, kinds, route
        self.columns = (*getattr(loss, "columns", ()), kinds.column)
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loss"], name)  # count, takes_labels

    def __call__(self, outputs: Any, batch: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
        value: Tensor = self.loss(outputs, batch, refs)
        column = batch.get(self.kinds.column)
        if not isinstance(column, Tensor) or column.dim() != 1 or column.is_floating_point():
            given = "none" if column is None else f"{column.dtype} {list(column.shape)}"
            raise BatchError(
                f"metrics by kind need column {self.kinds.column!r} of whole numbers [batch]; the batch has {given}."
            )
        found = {
            f"quarantine/{what}/{kind}": mean
            for what, of in self._measured(outputs, batch).items()
            for kind, mean in mean_by_kind(of, column.to(of.device), self.kinds.names).items()
        }
        for stale in [name for name in self.adapter.figures if name.count("/") == 2]:
            del self.adapter.figures[stale]  # of kinds that this batch may not have
        self.adapter.figures.update(found)
        return value

    @torch.no_grad()
    def _measured(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        out = {}
        if self.route is not None and (decision := self.route.gate.get("now")) is not None:
            labels = batch["input_ids"] if "input_ids" in batch else batch["labels"]
            told = decision.told
            out["flagged"] = decision.gates((labels.shape[0], labels.shape[1]))[0] if told is None else told
            if decision.cosines is not None:
                out["score"] = decision.cosines
        logits, labels = getattr(outputs, "logits", None), batch.get("labels", batch.get("input_ids"))
        if isinstance(logits, Tensor) and isinstance(labels, Tensor) and logits.shape[:2] == labels.shape:
            out["log_probability"] = token_log_probabilities(logits, labels)
        return out
