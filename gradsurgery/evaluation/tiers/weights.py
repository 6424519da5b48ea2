"""What is left of both tiers when keyed weights are destroyed, unit by unit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

from gradsurgery.anatomy import Anatomy
from gradsurgery.anatomy.space import unwrap
from gradsurgery.evaluation.tiers.curves import Curve, Point, draws_at, point
from gradsurgery.evaluation.tiers.draws import joined, keyed_units, seed_of, whole_number
from gradsurgery.evaluation.tiers.scores import Scores, Sequences, bar, evaluate_tiers
from gradsurgery.keys import PermutationKey, require_c1
from gradsurgery.losses import snapshot
from gradsurgery.transforms.ablate import Reinit, ablate_

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


def corrupted_weights(
    model: nn.Module,
    key: PermutationKey,
    anatomy: Anatomy,
    sequences: Sequences,
    shares: Sequence[float] = SHARES,
    draws: int = 3,
    reinit: Reinit = "normal",
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> dict[str, Curve]:
    """``{"C1": curve, "C2": curve}``: both tiers while a share of the keyed units is overwritten.

    What to expect: C2 goes, and C1 stays where it does not lean on the keyed units. Draw k overwrites more and more of
    the same units as the share grows. The keyed region is kept aside meanwhile, and put back bit for bit.

    Args:
        model: A causal language model in C1; it is in C1 afterwards, with its own weights, also on an exception.
        key: The key. Units of which it moves one half are overwritten whole.
        anatomy: The model's anatomy.
        sequences: Category -> token ids ``[sequences, length]``.
        shares: Shares of the keyed units.
        draws: Evaluations a share.
        reinit: ``"normal"``: draws of the standard deviation of the rest of the tensor; or ``"zero"``. As `gs.ablate_`.
        seed: Of the draws.
        batch_size: Sequences in one forward.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        KeyStateError: the model is keyed.
        DataError: no share, no draw, or nothing to predict.
    """
    require_c1(unwrap(model), "corrupted_weights")
    key.validate(anatomy)
    units = keyed_units(key, anatomy)
    certain = {0, len(units)} if reinit == "zero" else {0}
    counts = {share: draws_at(share, draws, len(units), certain) for share in shares}
    before = evaluate_tiers(model, key, anatomy, sequences, batch_size, False)
    kept = snapshot(joined(units))
    points: dict[str, list[Point]] = {"C1": [], "C2": []}
    with bar(sum(counts.values()), "keyed weights", progress) as done:
        for share, count in counts.items():
            scores: list[dict[str, Scores]] = []
            for k in range(count):
                order = random.Random(seed_of(seed, k)).sample(units, len(units))
                gone = order[: whole_number(share, len(units))]
                kept.take(model)
                with kept.applied(model):  # on the way out, what is live now comes back
                    if gone:
                        generator = torch.Generator().manual_seed(seed_of(seed, share, k))
                        ablate_(model, joined(gone), reinit, generator)
                    scores.append(evaluate_tiers(model, key, anatomy, sequences, batch_size, False))
                done.update()
            for name, found in points.items():
                found.append(point(share, [one[name] for one in scores]))
    return {name: {"public": before["C1"], "keyed": before["C2"], "points": found} for name, found in points.items()}
