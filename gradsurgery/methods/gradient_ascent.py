"""Gradient ascent on what is to be forgotten, descent on what is to be retained.

Jang et al. 2023, arXiv 2210.01504; with the retain term gradient difference (Liu et al. 2022, arXiv 2203.12817).
"""

from __future__ import annotations

from gradsurgery.losses import causal_lm
from gradsurgery.methods.sources import By, require_weight, source
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss


def gradient_ascent(
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
    *,
    by: By = "rows",
    forget: str = "forget",
    retain: str = "retain",
    loss: Loss = causal_lm,
) -> Method:
    """``g = retain_weight * g_retain - forget_weight * g_forget``.

    The loss that is ascended has no bound: many steps destroy the model. `npo` slows down by itself.

    Args:
        forget_weight: Weight of the ascent; positive.
        retain_weight: Weight of the descent; 0 is pure ascent, without a retain pass.
        by: ``forget`` and ``retain`` name bool columns (``"rows"``) or sub-batches (``"stream"``).
        loss: Loss of both.

    Raises:
        PlanError: weights out of range.

    Example:
        >>> surgery = gs.attach(gs.methods.gradient_ascent(retain_weight=0), model)
        >>> sorted(surgery.backward({**batch, "forget": torch.tensor([True, False])}))
        ['forget']
        >>> surgery.remove()
    """
    ascent = require_weight(forget_weight, "forget_weight", "gradient_ascent", positive=True)
    descent = require_weight(retain_weight, "retain_weight", "gradient_ascent")
    passes = [Pass("forget", loss, weight=-ascent, **source(by, forget, "gradient_ascent"))]
    if descent:
        passes.append(Pass("retain", loss, weight=descent, **source(by, retain, "gradient_ascent")))
    return Method(passes)
