"""How far rows would teach an adapter what a direction stands for: the cosine of each row's gradient with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery.adapters.handle import Handle
from gradsurgery.adapters.score import Score
from gradsurgery.anatomy.adapters import base_of
from gradsurgery.estimators.data import on_device
from gradsurgery.estimators.direction import Direction
from gradsurgery.losses.causal_lm import causal_lm
from gradsurgery.losses.references.base import evaluating, model_inputs


def cosines(adapter: Handle, direction: Direction, batch: Mapping[str, Any], loss: Any = causal_lm) -> Tensor:
    """``cos(f_b, v)`` of every row ``[batch]``, with ``f_b`` its gradient in the adapter's coordinates.

    Runs in eval mode with the quarantine off, as directions are estimated; gradients and modes are left as they were.

    Args:
        adapter: On its model.
        direction: Of this adapter.
        batch: Inputs and labels; no label columns.
        loss: What is differentiated, ``loss(outputs, batch, refs)``.

    Raises:
        ArtefactError: a direction of another adapter, or one that is zero.

    Example:
        >>> adapter = gs.adapters.add(model, "q_proj", rank=4)
        >>> pairs = [(batch, {name: x.flip(1) for name, x in batch.items()})]
        >>> direction = gs.estimators.paired_direction(model, adapter, pairs, noise="keep")
        >>> gs.adapters.cosines(adapter, direction, batch).shape
        torch.Size([2])
        >>> adapter.remove()
    """
    adapter.require_direction(direction.fingerprint, direction.coordinates, "cosines: the direction")
    host, score = adapter.host, Score(direction)
    given = on_device(batch, host)
    base = base_of(adapter.model)
    decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    inputs = model_inputs(base, given, decoder or getattr(loss, "takes_labels", False))
    with evaluating(host), adapter.without("quarantine"), torch.enable_grad(), adapter.probing() as probes:
        value = loss(host(**inputs), given, {})
        return score.cosines(probes.gradients(value, list(direction.axes), keep_graph=False))
