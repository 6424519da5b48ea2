"""GRU: unlearning whose gradient does not work against what is to be retained.

Wang et al. 2025, "GRU: Mitigating the Trade-off between Unlearning and Retention for LLMs", arXiv 2503.09117.
"""

from __future__ import annotations

from typing import Any, Literal

from gradsurgery.losses import causal_lm
from gradsurgery.methods.sources import FLOOR, By, Fixed, require_weight, source
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss, Reference
from gradsurgery.transforms import aggregate, ema, project
from gradsurgery.transforms.projection.options import Remove, Scope


def gru(
    decay: float = 0.2,
    max_cosine: float | None = None,
    forget_loss: Loss | None = None,
    retain_weight: float = 0.0,
    *,
    reference: Reference | None = None,
    by: By = "rows",
    forget: str = "forget",
    retain: str = "retain",
    remove: Remove = "conflict",
    scope: Scope = "global",
    retain_loss: Loss = causal_lm,
    metrics: Literal["global", "module"] | None = None,
) -> Method:
    """Unlearn along ``g``, without its part against a running mean ``m`` of the retain gradient ``r``.

    ``m <- decay * m + (1 - decay) * r``; where ``<g, m> < 0``: ``g <- g - <g, m> / <m, m> * m``; then, if asked for,
    ``g <- g + retain_weight * r``.

    Args:
        decay: Share of the old mean. The originals' ``moving_avg=0.8`` is the share of the *new* gradient: 0.2 here.
        max_cosine: The cosine that is removed counts at most this much (their ``cos_clip``: 0.5); ``None`` removes
            all of it.
        forget_loss: What unlearns, such as ``gs.losses.npo()``; ``None`` is gradient ascent on `causal_lm`.
        retain_weight: Adds that much of the step's retain gradient (their ``ce_coeff``).
        reference: What ``forget_loss`` is compared with, if it asks for one.
        by: ``forget`` and ``retain`` name bool columns (``"rows"``) or sub-batches (``"stream"``).
        remove, scope, metrics: As in `gs.project`.
        retain_loss: Loss of the retain rows.

    Raises:
        PlanError: an option out of range.

    Example:
        >>> surgery = gs.attach(gs.methods.gru(), model, torch.optim.AdamW(model.parameters()))
        >>> rows = {"forget": torch.tensor([True, False]), "retain": torch.tensor([False, True])}
        >>> sorted(surgery.backward({**batch, **rows}))
        ['forget', 'retain']
        >>> surgery.remove()
    """
    weight = require_weight(retain_weight, "retain_weight", "gru")
    refs = {} if reference is None else {"reference": reference}
    unlearn, sign = (causal_lm, -1.0) if forget_loss is None else (forget_loss, 1.0)
    passes = [
        Pass("forget", unlearn, weight=sign, refs=refs, **source(by, forget, "gru")),
        Pass("retain", retain_loss, into="retain", **source(by, retain, "gru")),
    ]
    clip = 1.0 if max_cosine is None else max_cosine
    mean = "mean" if weight else "retain"  # in place, unless the step's own gradient is still to be added
    stage: list[Any] = [
        ema("retain", decay, into=mean),
        project("main", mean, remove=remove, scope=scope, max_cosine=clip, floor=FLOOR, metrics=metrics),
    ]
    if weight:
        stage.append(aggregate(Fixed((1.0, weight)), slots=["main", "retain"]))
    return Method(passes, gradient=stage)
