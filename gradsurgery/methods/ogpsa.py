"""OGPSA: gradients stay orthogonal to reference gradients of general abilities (Sun et al. 2026, arXiv 2602.07892)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from gradsurgery.anatomy import Region
from gradsurgery.errors import PlanError
from gradsurgery.losses import causal_lm
from gradsurgery.methods.sources import FLOOR
from gradsurgery.surgery import Method, Pass, on_refresh
from gradsurgery.surgery import every as every_kth
from gradsurgery.surgery.passes import Loss
from gradsurgery.transforms import project
from gradsurgery.transforms.projection.options import Remove, Scope


def ogpsa(
    every: int = 30,
    references: str | Sequence[str] = "reference",
    scope: Scope = "tensor",
    remove: Remove = "both",
    *,
    from_stream: bool = True,
    region: Region | Sequence[Region] | None = None,
    loss: Loss = causal_lm,
    reference_loss: Loss = causal_lm,
    metrics: Literal["global", "module"] | None = None,
) -> Method:
    """Train orthogonally to the gradient of a reference set, which is taken anew every ``every`` steps.

    In every block, ``g <- g - sum_i <g, b_i> b_i`` with ``b`` an orthonormal basis of the reference gradients there:
    one for each reference set. Between refreshes the references are kept, one gradient each, also over a resume.

    Args:
        every: Steps that a reference gradient lives: 30 for finetuning, 5 for preference training in the originals.
        references: Name of the reference set, or of several, whose gradients then span a subspace.
        scope: The originals project in every parameter tensor by itself, which removes one direction a tensor and more
            of the gradient than ``"global"``, one direction in all.
        remove: Both signs, as the originals; ``"conflict"`` is what protects to first order.
        from_stream: Every ``every``-th step's batch brings the sub-batches ``batch[name]``. ``False``: you call
            ``surgery.refresh(name, batches)``, over as many batches as you like, at least every ``every`` steps.
        region: Entries that are projected.
        loss, reference_loss: Losses of the batch and of the reference sets.
        metrics: As in `gs.project`.

    Raises:
        PlanError: no reference set, or names twice.

    Example:
        >>> method = gs.methods.ogpsa(every=2, references=["general", "code"])
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> surgery = gs.attach(method, model, optimizer)
        >>> sorted(surgery.backward({**batch, "general": batch, "code": batch}))
        ['code', 'general', 'user']
        >>> surgery.remove()
    """
    names = [references] if isinstance(references, str) else list(references)
    if not names or len(set(names)) < len(names):
        raise PlanError(f"ogpsa takes one name of a reference set, or several different ones, not {references!r}.")
    when = every_kth(every) if from_stream else on_refresh()
    passes = [
        Pass(name, reference_loss, stream=name if from_stream else None, into=name, when=when, keep=every)
        for name in names
    ]
    projection: Any = project("main", names, remove=remove, scope=scope, region=region, floor=FLOOR, metrics=metrics)
    return Method([*passes, Pass("user", loss)], gradient=[projection])
