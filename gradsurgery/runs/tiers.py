"""What the holders of keys see of a model during and after a run: each tier, guesses of the key, parts of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy import Anatomy, Region
from gradsurgery.evaluation.tiers import (
    corrupted_keys,
    partial_keys,
    recovery_by_gradient,
    recovery_by_magnitude,
    recovery_rows,
    score,
    wrong_key,
)
from gradsurgery.evaluation.tiers.scores import tier
from gradsurgery.keys import PermutationKey
from gradsurgery.runs.metrics import Scorer

Keys = Sequence[PermutationKey | None]
Figures = dict[str, dict[str, float]]
"""``{category: {"loss", "accuracy"}}``: nats per token, and share of next tokens that are ranked first."""


def score_holders(
    model: nn.Module, holders: Mapping[str, Keys], anatomy: Anatomy, sequences: Mapping[str, Tensor]
) -> dict[str, Figures]:
    """Scores by holder, means over the keys of each; a key that is ``None`` is C1."""
    out: dict[str, Figures] = {}
    for name, keys in holders.items():
        each = []
        for key in keys:
            with tier(model, key, anatomy):
                each.append(score(model, sequences))
        out[name] = {
            category: {what: fmean(one[category][what] for one in each) for what in ("loss", "accuracy")}  # type: ignore[literal-required]
            for category in sequences
        }
    return out


def tier_scorer(
    tiers: Mapping[str, PermutationKey | None], anatomy: Anatomy, sequences: Mapping[str, Tensor]
) -> Scorer:
    """Held-back losses of every tier during training, as ``C2/es``."""

    def scores(model: nn.Module) -> dict[str, float]:
        found = score_holders(model, {name: [key] for name, key in tiers.items()}, anatomy, sequences)
        return {
            f"{name}/{category}": one["loss"] for name, figures in found.items() for category, one in figures.items()
        }

    return scores


def guesses(key: PermutationKey, anatomy: Anatomy, count: int, known: float, seed: int) -> dict[str, Keys]:
    """Random keys with as many swaps between each pair of layers, and random parts: ``known`` of the key's swaps."""
    seeds = [1_000_003 * (seed + 1) + k for k in range(count)]
    return {
        "random key": [wrong_key(key, anatomy, one) for one in seeds],
        f"{100 * known:g}% of the key": [key.subset(known, seed=one) for one in seeds],
    }


def attacks(
    model: nn.Module, key: PermutationKey, anatomy: Anatomy, sequences: Mapping[str, Tensor], draws: int, seed: int
) -> dict[str, Any]:
    """What a tier is worth under parts of its key and under the key with mistakes, and what the weights tell of it.

    Returns:
        ``{"curves": {name: Curve}, "recovery": rows}``: losses and AUCs, no swap.
    """
    public = next(iter(sequences.values()))
    found = {
        "magnitude": recovery_by_magnitude(model, key, anatomy),
        "gradient": recovery_by_gradient(model, key, anatomy, public),
    }
    return {
        "curves": {
            "part of the key": partial_keys(model, key, anatomy, sequences, subsets=draws, seed=seed),
            "key with mistakes": corrupted_keys(model, key, anatomy, sequences, draws=draws, seed=seed),
        },
        "recovery": [{"by": by, **row} for by, one in found.items() for row in recovery_rows(one)],
    }


def changed_entries(before: Mapping[str, Tensor], model: nn.Module, region: Region) -> int:
    """Entries of a region that are not bit for bit what they were."""
    return sum(_changed(before, model, region))


def _changed(before: Mapping[str, Tensor], model: nn.Module, region: Region) -> Iterator[int]:
    for name, parameter in model.named_parameters():
        entries = region.entries.get(name)
        if entries is not None:
            differs = _bits(before[name].to(parameter.device)) != _bits(parameter.detach())
            yield int((differs & entries.mask().to(parameter.device)).sum())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
