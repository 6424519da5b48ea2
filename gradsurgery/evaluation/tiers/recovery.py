"""Key recovery: do keyed units give themselves away, by the size of their weights, or by the gradient they get?

Each unit's norm is taken relative to the median of its layer, as a logarithm, so that layers and kinds of units
compare; the attack ranks by it, takes as many units as the key moves (which is more than an attacker knows), and is
scored against the truth. What it finds is which units are keyed, not which swaps with which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np
from torch import Tensor, nn

from gradsurgery.anatomy import Anatomy
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import DataError
from gradsurgery.evaluation.tiers.norms import gradients_of, unit_norms, weights_of
from gradsurgery.evaluation.tiers.scores import bar
from gradsurgery.keys import PermutationKey, require_c1
from gradsurgery.keys.lists import LISTS, slots_of
from gradsurgery.keys.slots import Place, SlotTable

RULES = ("smallest", "largest", "outlier")
"""Take the units of the smallest norms, of the largest, or those farthest from their layer's median either way."""
KINDS = {"head": "attention", "neuron": "mlp", "expert": "experts"}


class Recovery(TypedDict):
    """Scores of telling ``keyed`` units among ``units``; chance is precision = recall = keyed / units, AUC = 0.5."""

    auc: float
    accuracy: float
    precision: float
    recall: float
    f1: float
    keyed: int
    units: int


Recoveries = dict[str, dict[str, Recovery]]
"""Scores by kind of unit and rule."""


def recovery_by_magnitude(
    model: nn.Module, key: PermutationKey, anatomy: Anatomy, progress: bool | None = None
) -> Recoveries:
    """``{"attention" | "mlp" | "experts" | "combined": {"smallest" | "largest" | "outlier": scores}}``.

    Args:
        model: The model in C1; nothing of it is changed. Tensors are read one at a time.
        key: The truth that the attack is scored against.
        anatomy: The model's anatomy.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        KeyStateError: the model is keyed.

    Example:
        >>> from gradsurgery.evaluation.tiers import recovery_by_magnitude
        >>> key = gs.PermutationKey.generate(anatomy, seed=0)
        >>> found = recovery_by_magnitude(model, key, anatomy)
        >>> sorted(found), sorted(found["mlp"])
        (['combined', 'mlp'], ['largest', 'outlier', 'smallest'])
    """
    require_c1(unwrap(model), "recovery_by_magnitude")
    weights = weights_of(model)
    return _recovery(lambda place: unit_norms(weights, place), key, anatomy, progress)


def recovery_by_gradient(
    model: nn.Module,
    key: PermutationKey,
    anatomy: Anatomy,
    sequences: Tensor,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Recoveries:
    """The same, ranking by the size of the public tier's gradient relative to the weights, ``|g| / |theta|``.

    Public entries were trained until the public tier's gradient was small; keyed entries never saw that gradient.

    Args:
        model: A causal language model in C1; nothing of it is changed. Takes as much memory as all gradients.
        key: The truth that the attack is scored against.
        anatomy: The model's anatomy.
        sequences: Public text, token ids ``[sequences, length]``; entries below 0 are not counted.
        batch_size: Sequences in one forward.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        KeyStateError: the model is keyed.
        DataError: nothing to predict.
    """
    require_c1(unwrap(model), "recovery_by_gradient")
    if sequences.ndim != 2 or not (sequences[:, 1:] >= 0).any():
        raise DataError("the text holds nothing to predict: expected token ids [sequences, length >= 2].")
    weights, gradients = weights_of(model), gradients_of(model, sequences, batch_size)

    def size(place: Place) -> np.ndarray:
        of_weights = unit_norms(weights, place)
        return np.divide(unit_norms(gradients, place), of_weights, out=np.zeros(len(place)), where=of_weights > 0)

    return _recovery(size, key, anatomy, progress)


def _recovery(
    size: Callable[[Place], np.ndarray], key: PermutationKey, anatomy: Anatomy, progress: bool | None
) -> Recoveries:
    """Score every rule on the sizes of all units of the key's kinds."""
    key.validate(anatomy)
    moved = {(kind, slot) for kind, slot, _ in slots_of(key.lists)}
    table = SlotTable.of(anatomy)
    places = [
        (kind, layer, found)
        for kind in dict.fromkeys(LISTS[name].kind for name in key.lists)
        for layer, found in table.layers(kind).items()
    ]
    scores: dict[str, list[np.ndarray]] = {}
    truth: dict[str, list[bool]] = {}
    with bar(len(places), "units", progress) as done:
        for kind, layer, found in places:
            name, start = KINDS[kind], 0
            for place in found:
                scores.setdefault(name, []).append(relative(size(place)))
                truth.setdefault(name, []).extend((kind, (layer, start + i)) in moved for i in range(len(place)))
                start += len(place)
            done.update()
    joint = {name: np.concatenate(values) for name, values in scores.items()}
    labels = {name: np.asarray(values) for name, values in truth.items()}
    joint["combined"] = np.concatenate(list(joint.values()))
    labels["combined"] = np.concatenate(list(labels.values()))
    return {
        name: {rule: judged(ranked(values, rule), labels[name]) for rule in RULES} for name, values in joint.items()
    }


def relative(norms: np.ndarray) -> np.ndarray:
    """``log(norm / median)``; a dead unit among living ones is infinitely small, all dead ones are alike."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.log(norms) - np.log(np.median(norms)), nan=0.0, posinf=np.inf, neginf=-np.inf)


def ranked(values: np.ndarray, rule: str) -> np.ndarray:
    """Scores by which a rule takes the highest."""
    return {"smallest": -values, "largest": values, "outlier": np.abs(values)}[rule]


def judged(scores: np.ndarray, truth: np.ndarray) -> Recovery:
    """Take as many as are true, the highest scores first (ties by position), and count."""
    keyed = int(truth.sum())
    chosen = np.zeros(truth.size, dtype=bool)
    chosen[np.argsort(-scores, kind="stable")[:keyed]] = True
    right = int((chosen & truth).sum())
    precision = recall = right / keyed
    return {
        "auc": auc(scores, truth),
        "accuracy": float((chosen == truth).mean()),
        "precision": precision,
        "recall": recall,
        "f1": precision,  # as many are taken as are true, so that all three are one number
        "keyed": keyed,
        "units": int(truth.size),
    }


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Probability that a true one scores higher than another one, ties counting half (Mann-Whitney); nan without both.

    >>> import numpy as np
    >>> auc(np.array([3.0, 1.0, 2.0, 2.0]), np.array([True, False, True, False]))
    0.875
    """
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def recovery_rows(found: Mapping[str, Mapping[str, Recovery]]) -> list[dict[str, object]]:
    """Rows for `gradsurgery.evaluation.table`."""
    return [{"kind": kind, "rule": rule, **score} for kind, rules in found.items() for rule, score in rules.items()]
