"""Mixing in the data to protect: the baseline that needs no basis."""

from __future__ import annotations

from gradsurgery.errors import PlanError
from gradsurgery.losses import causal_lm
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss


def mixed(weight: float = 0.1, task: str = "task", protected: str = "protected", loss: Loss = causal_lm) -> Method:
    """``(1 - weight)`` times the loss on ``batch["task"]`` and ``weight`` times that on ``batch["protected"]``.

    Args:
        weight: Share of the protected data, between 0 and 1.
        task, protected: Names of the two sub-batches.
        loss: Loss on both.

    Raises:
        PlanError: a weight out of range.

    Example:
        >>> surgery = gs.attach(gs.methods.mixed(0.1), model, torch.optim.AdamW(model.parameters()))
        >>> list(surgery.backward({"task": batch, "protected": batch}))
        ['task', 'protected']
        >>> surgery.remove()
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1:
        raise PlanError(f"mixed: weight is a number between 0 and 1, not {weight!r}.")
    return Method(
        [Pass(task, loss, stream=task, weight=1 - weight), Pass(protected, loss, stream=protected, weight=weight)]
    )
