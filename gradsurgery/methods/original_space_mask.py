"""Freeze the most important entries of the weights as they are: what a rotation has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gradsurgery.errors import PlanError
from gradsurgery.estimators import Coordinates, Importance, Masks, top_k
from gradsurgery.losses import causal_lm
from gradsurgery.methods.warp import Others, keeping
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss


def original_space_mask(
    important: Importance | Masks,
    ratio: float = 0.1,
    scope: Literal["layer", "global"] = "layer",
    others: Others = "train",
    loss: Loss = causal_lm,
    passes: Sequence[Pass] | None = None,
) -> Method:
    """`warp` without a rotation: the masked entries do not move, exactly.

    Args:
        important: Importances, or masks made of them, in ``gs.estimators.identity_basis(model)``.
        ratio, scope, others, loss, passes: As in `warp`.

    Raises:
        PlanError: importances in a rotated basis.

    Example:
        >>> plain = gs.estimators.identity_basis(model, "mlp")
        >>> method = gs.methods.original_space_mask(gs.estimators.importance(model, plain, [batch]), ratio=0.05)
    """
    if not isinstance(important, Importance | Masks):
        raise PlanError(f"original_space_mask takes importances or masks, not {type(important).__name__}.")
    if any(vectors is not None for vectors in important.basis.vectors.values()):
        raise PlanError(
            "these are in rotated coordinates; estimate them in gs.estimators.identity_basis(model), or use warp."
        )
    masks = top_k(important, ratio, scope) if isinstance(important, Importance) else important
    return keeping("original_space_mask", Coordinates(masks.basis, masks), others, False, loss, passes)
