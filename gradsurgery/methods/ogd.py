"""Orthogonal gradient descent: new tasks move along directions that change no old prediction.

Farajtabar et al. 2020, "Orthogonal Gradient Descent for Continual Learning", arXiv 1910.07104, algorithm 1.
"""

from __future__ import annotations

from typing import Any, Literal

from gradsurgery.estimators import GradientMemory
from gradsurgery.losses import causal_lm
from gradsurgery.methods.sources import FLOOR
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss
from gradsurgery.transforms import project
from gradsurgery.transforms.projection.options import Scope


def ogd(
    memory: GradientMemory,
    scope: Scope = "global",
    at: Literal["gradient", "update"] = "gradient",
    *,
    loss: Loss = causal_lm,
    metrics: Literal["global", "module"] | None = None,
) -> Method:
    """``g <- g - sum_v <g, v> v`` over the orthonormal gradients ``v`` of earlier tasks.

    Args:
        memory: Stored gradients of earlier tasks: ``gs.estimators.gradient_memory``.
        scope: Global in the paper.
        at: The paper steps by plain gradient descent, where ``"gradient"`` is enough; with momentum or Adam only
            ``"update"`` keeps the weights from moving along the stored directions.
        loss: Loss of the new task.
        metrics: As in `gs.project`.

    Example:
        >>> memory = gs.estimators.gradient_memory(model, [batch], count=2)
        >>> surgery = gs.attach(gs.methods.ogd(memory), model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> sorted(surgery.backward(batch))
        ['task']
        >>> surgery.remove()
    """
    projection: Any = project("main", memory, remove="both", scope=scope, at=at, floor=FLOOR, metrics=metrics)
    passes = [Pass("task", loss)]
    return Method(passes, update=[projection]) if at == "update" else Method(passes, gradient=[projection])
