"""What a projection tells: cosines before and after, and how much was removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsurgery.transforms.projection.solve import along
from gradsurgery.transforms.projection.work import Work
from gradsurgery.transforms.stages import StepContext

if TYPE_CHECKING:
    from gradsurgery.transforms.projection.options import Projection


def note(options: Projection, work: Work, context: StepContext) -> None:
    """Add the metrics that were asked for to the step's."""
    context.metrics[f"project/{options.label}/vanished"] = work.vanished
    if options.metrics is None:
        return
    parts = [part for blocks in work.blocks for part in blocks.parts]
    after = torch.cat([blocks.by_part() for blocks in work.blocks])
    head = f"project/{options.slot}/{options.label}"
    places: dict[str, list[int]] = {"": list(range(len(parts)))}
    if options.metrics == "module":
        for k, part in enumerate(parts):
            places.setdefault(f"/module/{part.module}", []).append(k)
    for place, members in places.items():
        before, left = work.before[members].sum(0), after[members].sum(0)
        norm = before[0, 0].clamp(min=0).sqrt()
        removed = work.removed[members].sum().clamp(min=0).sqrt()
        context.metrics[f"{head}/cosine_before{place}"] = cosine(before)
        context.metrics[f"{head}/cosine_after{place}"] = cosine(left)
        context.metrics[f"{head}/norm_removed{place}"] = float(removed / norm) if norm > 0 else 0.0


def cosine(gram: Tensor) -> float:
    """Cosine of the first vector to the second, or (not negative) to the span of several."""
    norm = gram[0, 0].clamp(min=0).sqrt()
    return float(along(gram) / norm) if norm > 0 else 0.0
