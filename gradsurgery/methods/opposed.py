"""Opposed gradient projection: finetuning whose gradient is kept clear of the gradient towards a reference model.

The method of the OpposedGradientProjection script (version 9), its sign made explicit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from gradsurgery.anatomy import Region
from gradsurgery.errors import PlanError
from gradsurgery.losses import Cached, causal_lm, kl_divergence
from gradsurgery.methods.sources import FLOOR
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss, Reference
from gradsurgery.transforms import aggregate, project
from gradsurgery.transforms.projection.options import Remove, Scope


def opposed(
    reference: Reference,
    remove: Remove = "both",
    scope: Scope = "global",
    at: Literal["gradient", "update"] = "gradient",
    positive_weight: float = 1.0,
    unlearn_weight: float = 1.0,
    *,
    rows: str | None = None,
    region: Region | Sequence[Region] | None = None,
    kl: Loss = kl_divergence,
    loss: Loss = causal_lm,
    metrics: Literal["global", "module"] | None = None,
) -> Method:
    r"""One forward, two losses: ``g`` of the finetuning loss, ``u`` of the divergence from a reference model.

    ``g <- positive_weight * g - unlearn_weight * s * u`` with ``s = <g, u> / <u, u>``. A step along ``-u`` brings the
    model back to the reference, so the sign of ``<g, u>`` says what the finetuning step does to the reference's
    behaviour, and ``remove`` which of the two is taken out:

    * ``"conflict"``, ``<g, u> < 0``: the part of the step that would leave the reference. This *protects* its
      behaviour.
    * ``"agreement"``, ``<g, u> > 0``: the part that would also reinforce the reference. This is what the script says
      it does; once the model has left the reference it hardly ever applies.
    * ``"both"``: always, as the script is written. Measured on a small model, ``<g, u>`` was negative in 198 of 200
      steps: it protects.

    Args:
        reference: The model whose behaviour ``u`` speaks of: ``gs.losses.frozen(model)``, ``snapshot(region)``,
            ``adapters_off()`` or ``cached(path)``.
        remove: Which sign is removed.
        scope: Blocks with a coefficient of their own; see `gs.project`.
        at: ``"update"`` projects what the optimizer did to the weights instead of the gradient: Adam's momentum and
            preconditioner turn an orthogonal gradient into a step that is not orthogonal.
        positive_weight: Factor of ``g``; unlearn_weight: factor of what is removed.
        rows: Bool column of the rows that are opposed; all others are trained plainly, and their gradient is added
            unprojected. Each of the three losses is a mean over its own tokens. With ``at="update"`` there is one
            update of all rows, and all of it is projected.
        region: Entries that are projected; all that train by default.
        kl: The divergence, with ``refs["reference"]``. ``gs.losses.kl(padding=True)`` also counts padding, as the
            script does.
        loss: The finetuning loss.
        metrics: Cosines before and after, and the share that was removed: for the model, or for each module too.

    Raises:
        PlanError: options that do not exist, or a divergence over padding with a cache, which holds none.

    Example:
        >>> import copy
        >>> reference = gs.losses.frozen(copy.deepcopy(model))
        >>> surgery = gs.attach(gs.methods.opposed(reference), model, torch.optim.AdamW(model.parameters()))
        >>> sorted(surgery.backward(batch))
        ['kl', 'sft']
        >>> surgery.remove()
    """
    if at not in ("gradient", "update"):
        raise PlanError(f'opposed: at is "gradient" or "update", not {at!r}.')
    if getattr(kl, "padding", False) and isinstance(reference, Cached):
        raise PlanError("opposed: a cache holds no positions without attention_mask, and kl(padding=True) counts them.")
    mixed = rows is not None and at == "gradient"
    both = Pass(
        "opposed",
        {"sft": loss, "kl": kl},
        rows=rows,
        into={"sft": "sft" if mixed else "main", "kl": "protect"},
        refs={"reference": reference},
    )
    passes = [both] if rows is None else [Pass("plain", loss, rows=f"~{rows}"), both]
    projection: Any = project(
        "sft" if mixed else "main",
        away_from="protect",
        remove=remove,
        scope=scope,
        region=region,
        at=at,
        keep_weight=positive_weight,
        removed_weight=unlearn_weight,
        floor=FLOOR,
        metrics=metrics,
    )
    if at == "update":
        return Method(passes, update=[projection])
    return Method(passes, gradient=[projection, aggregate("sum", slots=["main", "sft"])] if mixed else [projection])
