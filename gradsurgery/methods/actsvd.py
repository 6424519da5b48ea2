"""ActSVD (Wei et al. 2024, arXiv 2402.05162, section 3.2): the ranks of ``W X`` that the old data uses stay."""

from __future__ import annotations

from collections.abc import Sequence

from gradsurgery.errors import PlanError
from gradsurgery.estimators import Basis, Coordinates
from gradsurgery.losses import causal_lm
from gradsurgery.methods.warp import Others, keeping
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss


def actsvd(
    basis: Basis,
    k: int | None = None,
    energy: float | None = None,
    others: Others = "train",
    gradient: bool = True,
    loss: Loss = causal_lm,
    passes: Sequence[Pass] | None = None,
) -> Method:
    """``dW <- dW - V V^T dW`` with the leading left singular vectors ``V`` of ``W X``: a row mask in rotated space.

    Args:
        basis: Output bases from the data to protect: ``gs.estimators.activation_basis(…, side="output")``.
        k: How many ranks of every weight are kept;
        energy: or as many as hold this share of the outputs' mean square. Neither: every direction that the basis has.
        others, gradient, loss, passes: As in `gpm`.

    Raises:
        PlanError: an input basis, both ``k`` and ``energy``.

    Example:
        >>> basis = gs.estimators.activation_basis(model, [batch], "mlp", side="output")
        >>> method = gs.methods.actsvd(basis, k=4)
    """
    if not isinstance(basis, Basis) or basis.side != "output":
        raise PlanError('actsvd takes a basis of outputs: gs.estimators.activation_basis(…, side="output").')
    kept = basis if k is None and energy is None else basis.top(k, energy)
    return keeping("actsvd", Coordinates(kept), others, gradient, loss, passes)
