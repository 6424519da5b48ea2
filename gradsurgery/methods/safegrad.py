"""SafeGrad: the user's gradient loses what works against alignment (Yi et al. 2025, arXiv 2508.07172)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from gradsurgery.anatomy import Region
from gradsurgery.losses import causal_lm, kl_divergence
from gradsurgery.methods.sources import FLOOR, Fixed, require_weight
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss, Reference
from gradsurgery.transforms import aggregate, project
from gradsurgery.transforms.projection.options import Remove, Scope


def safegrad(
    reference: Reference,
    stream: str = "alignment",
    remove: Remove = "conflict",
    scope: Scope = "global",
    alignment_weight: float = 0.0,
    *,
    region: Region | Sequence[Region] | None = None,
    kl: Loss = kl_divergence,
    loss: Loss = causal_lm,
    metrics: Literal["global", "module"] | None = None,
) -> Method:
    """Train on the batch, orthogonally to the divergence from an aligned reference on ``batch[stream]``.

    ``g <- g - min(0, <g, a>) / <a, a> * a``: only where the two are in conflict, with ``a`` the gradient of
    KL(reference ‖ model) on alignment data, of which few examples are enough (20 in the paper). Model and reference
    agree in the first step, which is a plain one.

    Args:
        reference: The aligned model before finetuning.
        stream: Sub-batch of alignment data, in every batch.
        remove: Which sign is removed; the paper's is ``"conflict"``.
        scope: Blocks with a coefficient of their own; global in the paper.
        alignment_weight: Adds that much of ``a`` itself to the gradient.
        region: Entries that are projected.
        kl, loss: Losses on the alignment data and on the user's.
        metrics: As in `gs.project`.

    Example:
        >>> import copy
        >>> method = gs.methods.safegrad(gs.losses.frozen(copy.deepcopy(model)))
        >>> surgery = gs.attach(method, model, torch.optim.AdamW(model.parameters()))
        >>> sorted(surgery.backward({**batch, "alignment": batch}))
        ['alignment', 'user']
        >>> surgery.remove()
    """
    weight = require_weight(alignment_weight, "alignment_weight", "safegrad")
    passes = [
        Pass("user", loss),
        Pass("alignment", kl, stream=stream, into="protect", refs={"reference": reference}),
    ]
    stage: list[Any] = [
        project("main", "protect", remove=remove, scope=scope, region=region, floor=FLOOR, metrics=metrics)
    ]
    if weight:
        stage.append(aggregate(Fixed((1.0, weight)), slots=["main", "protect"]))
    return Method(passes, gradient=stage)
