"""Means by kind of row, such as forget and retain, student and teacher: shares that are flagged, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradsurgery.errors import DataError


def mean_by_kind(values: Tensor, kinds: Tensor, names: Sequence[str] | None = None) -> dict[str, float]:
    """The mean of some values over the rows of each kind; kinds without a row are left out.

    Args:
        values: ``[rows]`` or ``[rows, token]``: numbers, or bools for rates. Entries that are nan are not counted.
        kinds: ``[rows]``, whole numbers or bools.
        names: Name of kind 0, 1, …; by default the numbers.

    Raises:
        DataError: shapes that do not go together, or a kind without a name.

    Example:
        >>> from gradsurgery.evaluation import mean_by_kind
        >>> flagged, is_hack = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
        >>> mean_by_kind(flagged, is_hack, ("honest", "hack"))
        {'honest': 0.5, 'hack': 0.5}
    """
    if kinds.dim() != 1 or kinds.is_floating_point() or values.shape[:1] != kinds.shape:
        raise DataError(
            f"kinds are whole numbers [rows], one for each row of the values; these are {kinds.dtype} "
            f"{list(kinds.shape)} for values {list(values.shape)}."
        )
    out = {}
    for kind in kinds.unique().tolist():
        if names is not None and not 0 <= int(kind) < len(names):
            raise DataError(f"there are rows of kind {int(kind)}, and names for {len(names)} kinds: name each of them.")
        found = values[(kinds == kind).to(values.device)].double().flatten()
        found = found[~found.isnan()]
        if len(found):
            out[names[int(kind)] if names is not None else str(int(kind))] = float(found.mean())
    return out


@torch.no_grad()
def token_log_probabilities(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """``log p(label_t | before t)`` in fp32 ``[batch, token - 1]``; nan where there is no label (-100).

    Args:
        logits_BTV: Of a causal language model, not shifted.
        labels_BT: As the model takes them.

    Raises:
        DataError: shapes that do not go together.
    """
    if logits_BTV.dim() != 3 or logits_BTV.shape[:2] != labels_BT.shape:
        raise DataError(f"logits {list(logits_BTV.shape)} and labels {list(labels_BT.shape)} do not go together.")
    out = []
    for logits_TV, labels_T in zip(logits_BTV[:, :-1], labels_BT[:, 1:].to(logits_BTV.device), strict=True):
        loss_T = cross_entropy(logits_TV.float(), labels_T.long(), reduction="none", ignore_index=-100)
        out.append((-loss_T).masked_fill(labels_T == -100, torch.nan))  # a row at a time: no second [batch, …, V]
    return torch.stack(out)


def mean_log_probability(
    logits_BTV: Tensor, labels_BT: Tensor, kinds_B: Tensor, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Mean log-probability of a token, in nats, over the rows of each kind: how far a policy drifts from its data.

    Students' and teachers' rollouts, say, in one batch: the kind is a column.

    Args:
        logits_BTV: Of a causal language model.
        labels_BT: What it should have said; -100 is not counted.
        kinds_B: The kind of each row.
        names: As in `mean_by_kind`.

    Example:
        >>> from gradsurgery.evaluation import mean_log_probability
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, -100]])
        >>> mean_log_probability(logits, labels, torch.tensor([0, 1]), ("student", "teacher"))["student"]  # log(1 / 4)
        -1.3862943649291992
    """
    found: Any = token_log_probabilities(logits_BTV, labels_BT)
    return mean_by_kind(found, kinds_B, names)
