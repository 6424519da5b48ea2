"""Gradient projection memory (Saha et al. 2021, arXiv 2103.09762): updates stay out of the old inputs' subspace."""

from __future__ import annotations

from collections.abc import Sequence

from gradsurgery.errors import PlanError
from gradsurgery.estimators import Basis, Coordinates
from gradsurgery.losses import causal_lm
from gradsurgery.methods.warp import Others, keeping
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss


def gpm(
    basis: Basis,
    energy: float | None = 0.97,
    others: Others = "train",
    gradient: bool = True,
    loss: Loss = causal_lm,
    passes: Sequence[Pass] | None = None,
) -> Method:
    """``G <- G - G U U^T``, and the same for the whole update; ``U`` holds ``energy`` of the old inputs.

    What the layers compute for inputs inside that subspace cannot change. A column mask in rotated coordinates.

    Args:
        basis: Input bases from the data to protect.
        energy: Share of the inputs' mean square to keep (0.97 in the paper, more for later tasks); ``None`` for every
            direction that the basis has.
        others, loss, passes: As in `warp`.
        gradient: Project the gradient, as the paper does, besides the update.

    Raises:
        PlanError: an output basis, or one that keeps too few directions.

    Example:
        >>> method = gs.methods.gpm(gs.estimators.activation_basis(model, [batch], "mlp"), energy=0.9)
    """
    if not isinstance(basis, Basis) or basis.side != "input":
        raise PlanError('gpm takes a basis of inputs: gs.estimators.activation_basis(…, side="input").')
    kept = basis if energy is None else basis.top(energy=energy)
    return keeping("gpm", Coordinates(kept), others, gradient, loss, passes)
