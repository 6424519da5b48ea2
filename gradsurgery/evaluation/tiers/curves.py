"""What C2 is worth to who has the wrong key, a key with mistakes in it, or a part of the key."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from torch import nn

from gradsurgery.anatomy import Anatomy
from gradsurgery.errors import DataError
from gradsurgery.evaluation.tiers.draws import corrupted_key, seed_of, whole_number
from gradsurgery.evaluation.tiers.scores import Scores, Sequences, bar, evaluate_tiers, score, tier
from gradsurgery.keys import PermutationKey

GRID = (0.01, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 1.0)
"""Shares of a key: fine where C2 comes back."""
CORRUPTED = tuple(round(1 - share, 2) for share in reversed(GRID))
"""The same points, as shares of a key that are wrong."""


class Spread(TypedDict):
    """Mean, sample standard deviation (0 of one value), extremes, and the values themselves."""

    mean: float
    std: float
    low: float
    high: float
    values: list[float]


class Point(TypedDict):
    """``draws`` evaluations at one ``share``; spreads of loss and accuracy by category."""

    share: float
    draws: int
    loss: dict[str, Spread]
    accuracy: dict[str, Spread]


class Curve(TypedDict):
    """The tiers as they are, and points between them."""

    public: Scores
    keyed: Scores
    points: list[Point]


def spread(values: Sequence[float]) -> Spread:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "mean": statistics.fmean(values),
        "std": std,
        "low": min(values),
        "high": max(values),
        "values": list(values),
    }


def wrong_keys(
    model: nn.Module,
    key: PermutationKey,
    anatomy: Anatomy,
    sequences: Sequences,
    count: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Curve:
    """C2 under ``count`` random keys with as many swaps between the same layers: one point, at share 1.

    Args:
        model: A causal language model in C1; it is in C1 afterwards, also on an exception.
        key: The right key.
        anatomy: The model's anatomy.
        sequences: Category -> token ids ``[sequences, length]``.
        count: Number of wrong keys.
        seed: Of the draws.
        batch_size: Sequences in one forward.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        KeyStateError: the model is keyed.
        DataError: ``count`` below 1, or nothing to predict.
    """
    return corrupted_keys(model, key, anatomy, sequences, (1.0,), count, seed, batch_size, progress)


def corrupted_keys(
    model: nn.Module,
    key: PermutationKey,
    anatomy: Anatomy,
    sequences: Sequences,
    shares: Sequence[float] = CORRUPTED,
    draws: int = 5,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Curve:
    """C2 under the key with a share of its swaps replaced by random others between the same layers.

    Draw k replaces more and more of the same swaps as the share grows. Arguments and errors as of `wrong_keys`.
    """

    def one(share: float, k: int) -> PermutationKey:
        return corrupted_key(key, anatomy, share, seed_of(seed, k))

    counts = [draws_at(share, draws, len(key), {0}) for share in shares]
    return _curve(model, key, anatomy, sequences, dict(zip(shares, counts, strict=True)), one, batch_size, progress)


def partial_keys(
    model: nn.Module,
    key: PermutationKey,
    anatomy: Anatomy,
    sequences: Sequences,
    shares: Sequence[float] = GRID,
    subsets: int = 100,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Curve:
    """C2 under ``subsets`` random parts of the key at each share; a part of no swap is C1.

    Arguments and errors as of `wrong_keys`.
    """

    def one(share: float, k: int) -> PermutationKey:
        return key.subset(share, seed_of(seed, share, k))

    counts = [draws_at(share, subsets, len(key), {0, len(key)}) for share in shares]
    return _curve(model, key, anatomy, sequences, dict(zip(shares, counts, strict=True)), one, batch_size, progress)


def _curve(
    model: nn.Module,
    key: PermutationKey,
    anatomy: Anatomy,
    sequences: Sequences,
    draws: Mapping[float, int],
    one: Callable[[float, int], PermutationKey],
    batch_size: int,
    progress: bool | None,
) -> Curve:
    """``one(share, k)`` is the key of draw ``k``; ``draws`` says how many a share has."""
    tiers = evaluate_tiers(model, key, anatomy, sequences, batch_size, False)
    points = []
    with bar(sum(draws.values()), "keys", progress) as done:
        for share, count in draws.items():
            scores = []
            for k in range(count):
                with tier(model, one(share, k), anatomy):
                    scores.append(score(model, sequences, batch_size))
                done.update()
            points.append(point(share, scores))
    return {"public": tiers["C1"], "keyed": tiers["C2"], "points": points}


def draws_at(share: float, draws: int, total: int, certain: set[int]) -> int:
    """How many draws a share needs: one where it makes a ``certain`` number out of ``total``.

    Raises:
        DataError: no share, or less than one draw.
    """
    if type(draws) is not int or draws < 1:
        raise DataError(f"{draws!r} draws a point: give 1 or more.")
    return 1 if whole_number(share, total) in certain else draws


def point(share: float, scores: Sequence[Scores]) -> Point:
    categories = list(scores[0])
    loss = {c: spread([one[c]["loss"] for one in scores]) for c in categories}
    accuracy = {c: spread([one[c]["accuracy"] for one in scores]) for c in categories}
    return {"share": share, "draws": len(scores), "loss": loss, "accuracy": accuracy}


def curve_rows(curves: Mapping[str, Curve], category: str) -> list[dict[str, object]]:
    """Rows for `gradsurgery.evaluation.table`: a point each, with the tiers at the ends."""
    rows: list[dict[str, object]] = []
    for name, curve in curves.items():
        for label, scores in (("C1", curve["public"]), ("C2", curve["keyed"])):
            rows.append({"curve": name, "share": label, "draws": 1, "loss": scores[category]["loss"]})
            rows[-1]["accuracy"] = scores[category]["accuracy"]
        for at in curve["points"]:
            loss, accuracy = at["loss"][category], at["accuracy"][category]
            row: dict[str, object] = {"curve": name, "share": f"{at['share']:g}", "draws": at["draws"]}
            rows.append({**row, "loss": loss["mean"], "std": loss["std"], "accuracy": accuracy["mean"]})
    return rows
