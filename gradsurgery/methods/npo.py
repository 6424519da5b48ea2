"""Negative preference optimization as a method (Zhang et al. 2024, arXiv 2404.05868)."""

from __future__ import annotations

from gradsurgery.losses import causal_lm
from gradsurgery.losses import npo as npo_loss
from gradsurgery.methods.sources import By, require_weight, source
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss, Reference


def npo(
    reference: Reference,
    beta: float = 0.1,
    retain_weight: float = 1.0,
    *,
    by: By = "rows",
    forget: str = "forget",
    retain: str = "retain",
    retain_loss: Loss = causal_lm,
) -> Method:
    """``npo(forget rows) + retain_weight * retain_loss(retain rows)``.

    Args:
        reference: The model before unlearning.
        beta: See `gs.losses.npo`.
        retain_weight: 0 leaves the retain pass out.
        by: ``forget`` and ``retain`` name bool columns (``"rows"``) or sub-batches (``"stream"``).
        retain_loss: `causal_lm`, or ``gs.losses.kl_divergence`` to the same reference.

    Raises:
        PlanError: an option out of range.

    Example:
        >>> import copy
        >>> method = gs.methods.npo(gs.losses.frozen(copy.deepcopy(model)), retain_loss=gs.losses.kl_divergence)
        >>> surgery = gs.attach(method, model)
        >>> rows = {"forget": torch.tensor([True, False]), "retain": torch.tensor([False, True])}
        >>> round(surgery.backward({**batch, **rows})["forget"].item(), 4)
        13.8629
        >>> surgery.remove()
    """
    weight, refs = require_weight(retain_weight, "retain_weight", "npo"), {"reference": reference}
    passes = [Pass("forget", npo_loss(beta), refs=refs, **source(by, forget, "npo"))]
    if weight:
        held = {} if retain_loss is causal_lm else refs
        passes.append(Pass("retain", retain_loss, weight=weight, refs=held, **source(by, retain, "npo")))
    return Method(passes)
