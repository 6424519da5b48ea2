"""Exactly the largest scores: per weight or over all of them, ties in the order of their indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from gradsurgery.errors import BatchError, PlanError, SelectionError
from gradsurgery.estimators.importance import Importance
from gradsurgery.estimators.masks import Masks

_LOW, _CHUNK = 16, 1 << 24


def top_k(importance: Importance, ratio: float, scope: Literal["layer", "global"] = "layer") -> Masks:
    """Masks of the ``ratio`` largest scores.

    Their number is exact, ``round(ratio * number)``, also where most scores are zero or equal (a quantile as threshold
    then takes all or none); of equal scores those of the lowest indices are taken.

    Args:
        importance: Scores by weight.
        ratio: Share of the scores, above 0 and up to 1.
        scope: ``"layer"`` takes the share of every weight, ``"global"`` of all together, by a threshold that is found
            in passes over the weights, one at a time.

    Raises:
        PlanError: a ratio or scope out of range.
        SelectionError: so few scores that the share rounds to none.
        BatchError: scores with nan.

    Example:
        >>> basis = gs.estimators.activation_basis(model, [batch], "down_proj")
        >>> important = gs.estimators.top_k(gs.estimators.importance(model, basis, [batch]), 0.1)
        >>> important.count("model.layers.0.mlp.down_proj.weight"), round(0.1 * 32 * 32)
        (102, 102)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise PlanError(f"top_k: ratio is a share above 0 and up to 1, not {ratio!r}.")
    if scope not in ("layer", "global"):
        raise PlanError(f'top_k: scope is "layer" or "global", not {scope!r}.')
    names = list(importance.scores)
    groups = [[name] for name in names] if scope == "layer" else [names]
    out: dict[str, Tensor] = {}
    for group in groups:
        count = round(ratio * sum(importance.scores[name].numel() for name in group))
        if not count:
            raise SelectionError(
                f"top_k: {ratio:g} of the scores of {group[0]} rounds to none; ask for a larger ratio."
            )
        smallest, ties = threshold([importance.scores[name] for name in group], count)
        for name in group:
            bits = _ordered(importance.scores[name], name)
            mask = bits > smallest
            equal = (bits == smallest).nonzero().squeeze(-1)[:ties]
            ties -= len(equal)
            mask[equal] = True
            out[name] = mask.reshape(importance.scores[name].shape)
    about = {"ratio": ratio, "scope": scope, "form": importance.form, "importance": dict(importance.about)}
    return Masks.of(importance.basis, out, about)


def threshold(scores: Iterable[Tensor], count: int) -> tuple[int, int]:
    """The ``count``-th largest score, as the integer of its bits, and how many of that very score are still needed.

    Two histograms, of the upper and the lower 16 bits: floats that are not negative are ordered like their bits.
    """
    scores = list(scores)
    high, needed = _place(_histogram(scores, lambda bits: bits >> _LOW), count)
    low, needed = _place(
        _histogram(scores, lambda bits: (bits & (1 << _LOW) - 1).where(bits >> _LOW == high, -1)), needed
    )
    return (high << _LOW) + low, needed


def _histogram(scores: list[Tensor], digit: Callable[[Tensor], Tensor]) -> Tensor:
    out = torch.zeros(1 << _LOW, dtype=torch.int64)
    for each in scores:
        for part in _ordered(each, "a weight").split(_CHUNK):
            digits = digit(part)
            out += torch.bincount(digits[digits >= 0], minlength=1 << _LOW).cpu()
    return out


def _place(histogram: Tensor, count: int) -> tuple[int, int]:
    """The digit that holds the ``count``-th largest, and how many of it are needed."""
    above = histogram.flip(0).cumsum(0).flip(0)
    digit = int((above >= count).nonzero().max())
    return digit, count - int(above[digit] - histogram[digit])


def _ordered(scores: Tensor, name: str) -> Tensor:
    """Flat int32 that are ordered like the scores."""
    flat = scores.detach().reshape(-1).float() + 0.0  # -0.0 becomes 0.0
    if not bool((flat >= 0).all()):
        raise BatchError(f"top_k: the scores of {name} hold nan or negative numbers.")
    return flat.contiguous().view(torch.int32)
