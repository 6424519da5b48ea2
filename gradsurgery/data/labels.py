"""Which rows carry a label: partial labels and labelling mistakes, as in SGTM (arXiv 2512.05648, sections 4 and D).

A row is labelled ``forget``, labelled ``retain``, or carries neither label and trains everything. Forget data without
its label is *undiscovered*: recall 0.9 leaves 10% of it undiscovered.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery.errors import DataError


@dataclass(frozen=True)
class Noise:
    """How well a classifier finds the forget rows, as recall and precision or as true and false positive rate.

    With P forget rows and N rows that may be mistaken for them (fractions are rounded to the nearest row):

        recall, precision:   TP = recall * P,   FP = TP * (1 / precision - 1)
        tpr, fpr:            TP = tpr * P,      FP = fpr * N

    (The released SGTM code computes FP as fpr * TP.) TP forget rows carry the label, FP others do by mistake.
    """

    recall: float | None = None
    precision: float | None = None
    tpr: float | None = None
    fpr: float | None = None

    def __post_init__(self) -> None:
        for name in ("recall", "precision", "tpr", "fpr"):
            value = getattr(self, name)
            if value is not None:
                _check_rate(name, value)
        if self.precision == 0:
            raise DataError("precision=0 would need infinitely many false positives: give a precision above 0.")
        if (self.tpr is not None or self.fpr is not None) and (self.recall is not None or self.precision is not None):
            raise DataError("noise is given twice: use recall and precision, or tpr and fpr, not both pairs.")

    def counts(self, positives: int, negatives: int) -> tuple[int, int]:
        """(true positives, false positives) among that many forget rows and rows that may be mistaken for them."""
        rate = self.tpr if self.tpr is not None else self.recall
        true = _round((1.0 if rate is None else rate) * positives)
        if self.fpr is not None:
            return true, _round(self.fpr * negatives)
        false = _round(true * (1 / (1.0 if self.precision is None else self.precision) - 1))
        if false > negatives:
            raise DataError(
                f"precision={self.precision} with {true} true positives asks for {false} false positives, but only "
                f"{negatives} rows can be mistaken: raise the precision or lower the recall."
            )
        return true, false


@dataclass(frozen=True, eq=False)
class Labels:
    """Two bool columns, ``[rows]``; no row carries both."""

    forget: Tensor
    retain: Tensor


def label_rows(
    categories: Sequence[str],
    *,
    forget: str | Collection[str],
    adjacent: str | Collection[str] = (),
    noise: Noise | None = None,
    false_positives: str | Collection[str] | None = None,
    forget_retain: float = 0.0,
    adjacent_retain: float = 0.0,
    retain_retain: float = 1.0,
    seed: int = 0,
) -> Labels:
    """Label rows (documents or packed sequences) by their category; deterministic given ``seed``.

    Args:
        categories: The category of each row. What is neither forget nor adjacent is retain.
        forget: The category or categories to be removed.
        adjacent: Categories close to them.
        noise: Mistakes in finding the forget rows; without it each of them is found and nothing else.
        false_positives: Categories whose rows may be mistaken; by default every category but the forget ones.
        forget_retain: Share of the discovered forget rows that carry the label retain instead of forget.
        adjacent_retain: Share of the adjacent rows, those taken for forget aside, that carry the label retain.
        retain_retain: The same share of the retain rows. (These three are the originals' ``*-retain-perc`` / 100.)
        seed: Of the draws; shares are exact counts, rounded to the nearest row, not chances.
    """
    for name, share in (("forget", forget_retain), ("adjacent", adjacent_retain), ("retain", retain_retain)):
        _check_rate(f"{name}_retain", share)
    present = set(categories)
    forgets, adjacents = _names(forget), _names(adjacent)
    mistaken = present - forgets if false_positives is None else _names(false_positives)
    if not forgets:
        raise DataError("forget names no category: nothing would be removed.")
    if unknown := (forgets | adjacents | mistaken) - present:
        raise DataError(f"no row has category {', '.join(sorted(unknown))}; there are {', '.join(sorted(present))}.")
    if twice := forgets & (adjacents | mistaken):
        raise DataError(f"category {', '.join(sorted(twice))} is forget and cannot be adjacent or mistaken as well.")

    rng = random.Random(seed)
    positives = [i for i, category in enumerate(categories) if category in forgets]
    negatives = [i for i, category in enumerate(categories) if category in mistaken]
    true, false = (noise or Noise()).counts(len(positives), len(negatives))
    found = rng.sample(positives, true)
    taken = set(rng.sample(negatives, false))
    kept = set(rng.sample(found, _round(forget_retain * len(found))))
    near = [i for i, category in enumerate(categories) if category in adjacents and i not in taken]
    rest = [i for i, category in enumerate(categories) if category not in forgets | adjacents and i not in taken]
    retained = kept.union(
        rng.sample(near, _round(adjacent_retain * len(near))), rng.sample(rest, _round(retain_retain * len(rest)))
    )
    return Labels(_column((set(found) - kept) | taken, len(categories)), _column(retained, len(categories)))


def _column(flagged: Collection[int], rows: int) -> Tensor:
    column = torch.zeros(rows, dtype=torch.bool)
    column[sorted(flagged)] = True
    return column


def _names(categories: str | Collection[str]) -> set[str]:
    return {categories} if isinstance(categories, str) else set(categories)


def _round(count: float) -> int:
    return int(count + 0.5)


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:  # also refuses nan
        raise DataError(f"{name}={rate} is no rate: give a number from 0 to 1.")
