"""How well labels find the forget documents: true and false positive rate, precision, recall, what stays undiscovered.

With P forget documents and N others, adjacent and retain alike:

    TPR = recall = TP / P      FPR = FP / N      precision = TP / (TP + FP)      undiscovered = FN / P = 1 - recall

(SGTM's released code takes FPR of TP instead of N, and false positives from the adjacent documents alone.) Labels with
given rates are drawn by ``data.label_rows(…, noise=data.Noise(tpr=…, fpr=…))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery.errors import DataError


@dataclass(frozen=True)
class DetectorRates:
    """Counts of a detector's decisions over documents (or tokens), and the rates that follow from them.

    Counts may be fractions where they are expectations.
    """

    true_positives: float
    false_positives: float
    positives: float
    negatives: float

    def __post_init__(self) -> None:
        if not (0 <= self.true_positives <= self.positives and 0 <= self.false_positives <= self.negatives):
            raise DataError(
                f"{self.true_positives:g} true positives of {self.positives:g} and {self.false_positives:g} false "
                f"positives of {self.negatives:g} cannot be: each lies between 0 and the number behind it."
            )

    @property
    def tpr(self) -> float:
        """True positive rate, which is recall; nan without forget documents."""
        return _ratio(self.true_positives, self.positives)

    recall = tpr

    @property
    def fpr(self) -> float:
        """False positive rate over all documents that are not forget; nan without any."""
        return _ratio(self.false_positives, self.negatives)

    @property
    def precision(self) -> float:
        """Share of the labelled documents that are forget; nan where none is labelled."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def undiscovered(self) -> float:
        """Share of the forget documents without a label."""
        return 1 - self.tpr

    @property
    def contamination(self) -> float:
        """Share of the unlabelled documents that are forget: what a data filter leaves in its training data."""
        missed = self.positives - self.true_positives
        return _ratio(missed, missed + self.negatives - self.false_positives)

    @classmethod
    def of_labels(cls, labelled: Tensor | Sequence[bool], is_forget: Tensor | Sequence[bool]) -> DetectorRates:
        """Count labels against the truth, both bool ``[documents]``.

        Example:
            >>> from gradsurgery.evaluation import DetectorRates
            >>> rates = DetectorRates.of_labels([True, False, True, False, False], [True, True, False, False, False])
            >>> rates.tpr, round(rates.fpr, 4), rates.precision, rates.undiscovered
            (0.5, 0.3333, 0.5, 0.5)
        """
        given, truth = torch.as_tensor(labelled), torch.as_tensor(is_forget)
        if given.dtype != torch.bool or truth.dtype != torch.bool or given.shape != truth.shape or given.dim() != 1:
            raise DataError(
                f"labels and truth are bool [documents]; these are {given.dtype} {list(given.shape)} and "
                f"{truth.dtype} {list(truth.shape)}."
            )
        counts = ((given & truth).sum(), (given & ~truth).sum(), truth.sum(), (~truth).sum())
        return cls(*(int(count) for count in counts))

    @classmethod
    def from_rates(cls, tpr: float, fpr: float, positives: float, negatives: float) -> DetectorRates:
        """A detector of given true and false positive rate."""
        _require_rate("tpr", tpr)
        _require_rate("fpr", fpr)
        return cls(tpr * positives, fpr * negatives, positives, negatives)

    @classmethod
    def from_precision_recall(
        cls, precision: float, recall: float, positives: float, negatives: float
    ) -> DetectorRates:
        """A detector of given precision and recall: ``FP = TP * (1 / precision - 1)``.

        Raises:
            DataError: no rates, or more false positives than there are other documents.

        Example:
            >>> from gradsurgery.evaluation import DetectorRates
            >>> DetectorRates.from_precision_recall(0.8, 0.5, positives=80, negatives=1000).fpr   # 10 of 1,000
            0.01
        """
        _require_rate("precision", precision)
        _require_rate("recall", recall)
        if precision == 0:
            raise DataError("precision=0 would need infinitely many false positives: give a precision above 0.")
        true = recall * positives
        false = true / precision - true
        if false > negatives:
            raise DataError(
                f"precision={precision} and recall={recall} ask for {false:g} false positives among {negatives:g} "
                f"documents: raise the precision or lower the recall."
            )
        return cls(true, false, positives, negatives)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _require_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise DataError(f"{name}={rate} is no rate: give a number from 0 to 1.")
