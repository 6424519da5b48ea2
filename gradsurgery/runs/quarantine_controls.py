"""The variants of a quarantine that every recipe runs, the controls among them, and what beats the controls.

A direction found in pairs flags hardly better than a random one unless it is shown to (wassname, vGROUT), so that every
result stands beside a random direction, labels dealt out at random, and pairs that differ in something else.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery import methods
from gradsurgery.adapters import Kinds, Quantile, Score
from gradsurgery.adapters.handle import Handle
from gradsurgery.adapters.kinds import ByKind
from gradsurgery.adapters.meter import Meter
from gradsurgery.adapters.score import By
from gradsurgery.errors import PlanError
from gradsurgery.estimators import paired_direction
from gradsurgery.estimators.direction import Direction
from gradsurgery.losses import causal_lm
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
"""``(unwanted, wanted)`` batches, row beside row."""


@dataclass(frozen=True)
class Variant:
    """How rows are routed.

    Args:
        about: For the report.
        mode: Of `gs.methods.quarantine`; ``None`` trains both parts on everything.
        labels: Whether the label flags rows: as it is, dealt out at random (``"shuffled"``), or not at all.
        direction: Where the direction comes from that scores rows (or is erased), if any.
        control: It holds nothing of what is to be removed; what is claimed has to beat it.
    """

    about: str
    mode: Literal["route", "absorb", "erase"] | None = None
    labels: Literal["given", "shuffled"] | None = None
    direction: Literal["pairs", "random", "placebo"] | None = None
    control: bool = False

    @property
    def scores(self) -> bool:
        """Whether rows are flagged by their gradients."""
        return self.direction is not None and self.mode != "erase"


VARIANTS: dict[str, Variant] = {
    "plain": Variant("the same adapter, both parts trained on everything"),
    "route": Variant("labelled rows teach the quarantine alone", "route", "given"),
    "absorb": Variant("the quarantine takes part for labelled rows alone", "absorb", "given"),
    "score": Variant("rows along the direction of pairs teach the quarantine alone", "route", None, "pairs"),
    "label_and_score": Variant("labelled rows along the direction of pairs do", "route", "given", "pairs"),
    "erase": Variant("the kept gradient without its part along the direction of pairs", "erase", None, "pairs"),
    "random_direction": Variant("rows along a random direction teach the quarantine", "route", None, "random", True),
    "shuffled_labels": Variant("as many rows as are labelled, drawn at random", "route", "shuffled", None, True),
    "placebo_pairs": Variant("rows along the direction of pairs that differ otherwise", "route", None, "placebo", True),
}
CONTROLS = tuple(name for name, variant in VARIANTS.items() if variant.control)


def require_variants(names: Sequence[str]) -> None:
    """Raise a `PlanError` for variants that do not exist, are named twice, or lack what they are compared with."""
    if unknown := [name for name in names if name not in VARIANTS]:
        raise PlanError(f"variants are {', '.join(VARIANTS)}, not {', '.join(unknown)}.")
    if len(set(names)) < len(names):
        raise PlanError(f"variants names each variant once; given are {', '.join(names)}.")
    if missing := [name for name in ("plain", "random_direction") if name not in names]:
        raise PlanError(f"every variant is compared with {' and '.join(missing)}: add it to variants.")


def shuffled(flags: Tensor, seed: int = 0) -> Tensor:
    """As many flags, dealt out at random: a permutation of the rows ``[batch, …]``.

    Example:
        >>> from gradsurgery.runs.quarantine_controls import shuffled
        >>> shuffled(torch.tensor([True, True, False, False, False, False])).sum()
        tensor(2)
    """
    return flags[torch.randperm(len(flags), generator=torch.Generator().manual_seed(seed)).to(flags.device)]


def placebo_of(wanted: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Pair]:
    """Pairs whose sides are both wanted, so that they differ in everything but what is to be removed.

    Args:
        wanted: Batches of wanted rows of one size and length, at least two.
        seed: Of who is paired with whom.

    Raises:
        PlanError: fewer than two batches.
    """
    if len(wanted) < 2:
        raise PlanError(f"placebo pairs need two batches of wanted rows at least, not {len(wanted)}.")
    order = random.Random(seed).sample(range(len(wanted)), len(wanted))
    return [(wanted[order[k - 1]], wanted[order[k]]) for k in range(len(order))]


def direction_for(
    variant: Variant,
    model: nn.Module,
    adapter: Handle,
    pairs: Sequence[Pair],
    placebo: Sequence[Pair],
    loss: Loss = causal_lm,
    seed: int = 0,
) -> Direction | None:
    """The direction that a variant takes; layers below the noise floor are kept, as a random direction's are.

    Args:
        variant: One of ``VARIANTS``.
        model: The model that has the adapter.
        adapter: On the model.
        pairs: What to remove, and what else to keep.
        placebo: Pairs of `placebo_of`, or others that differ in something else.
        loss: What is differentiated.
        seed: Of the random direction.
    """
    if variant.direction is None:
        return None
    found = paired_direction(
        model, adapter, placebo if variant.direction == "placebo" else pairs, loss, noise="keep", seed=seed
    )
    return found.random(seed) if variant.direction == "random" else found


def method_for(
    variant: Variant,
    adapter: Handle,
    direction: Direction | None = None,
    threshold: Quantile | float | None = None,
    by: By = "sequence",
    loss: Loss = causal_lm,
    where: str = "flag",
    kinds: Kinds | None = None,
) -> Method:
    """The method of a variant, for ``adapter.host``.

    Args:
        variant: One of ``VARIANTS``.
        adapter: With both parts, the same for every variant.
        direction: Of `direction_for`.
        threshold: Of scores, by default `Quantile`.
        by: What is scored.
        loss: Of the pass.
        where: The label column; a variant with shuffled labels reads ``shuffled_`` and this, made by `shuffled`.
        kinds: Kinds of rows whose metrics are told apart.
    """
    if variant.mode is None:
        watched = loss if kinds is None else ByKind(loss, adapter, kinds)
        return Method([Pass("plain", watched)], update=[Meter(adapter)])
    if variant.mode == "erase":
        return methods.quarantine(adapter, "erase", direction=direction, loss=loss, kinds=kinds)
    column = {"given": where, "shuffled": f"shuffled_{where}", None: None}[variant.labels]
    score = None
    if variant.scores and direction is not None:
        score = Score(direction, Quantile() if threshold is None else threshold, by)
    return methods.quarantine(adapter, variant.mode, column, score, loss=loss, kinds=kinds)


def verdicts(merits: Mapping[str, float], unit: str = "", margin: float = 0.0) -> list[str]:
    """A sentence for every variant that does not beat a control; one that says so where all do.

    Args:
        merits: By variant, what it is good for; more is better. ``plain`` is no claim.
        unit: Of the merits.
        margin: By how much a control must be beaten, such as the spread over seeds.

    Example:
        >>> from gradsurgery.runs.quarantine_controls import verdicts
        >>> verdicts({"plain": 0.0, "route": 2.0, "score": 0.125, "random_direction": 0.25}, "nats")
        ['score does not beat the random direction: 0.125 against 0.25 nats.']
    """
    out = []
    unit = f" {unit}" if unit else ""
    for name, merit in merits.items():
        if name == "plain" or name in CONTROLS:
            continue
        for control in CONTROLS:
            if control in merits and not merit > merits[control] + margin:
                what = control.replace("_", " ")
                out.append(f"{name} does not beat the {what}: {merit:.3g} against {merits[control]:.3g}{unit}.")
    return out or ["Every variant beats every control that was run with it."]
