"""Scores for hosts that own forward and backward themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradsurgery.adapters.route import Route
from gradsurgery.errors import PlanError


def decide(surgery: Any, loss: Tensor, batch: Mapping[str, Any] | None = None) -> Tensor:
    """Flag the rows of the forward under way, inside ``surgery.running("train", batch)``, before ``loss.backward()``.

    Under ``"route"`` the backward may follow at once; under ``"absorb"`` the model must run again first, since the
    forward that was scored had no quarantine.

    Args:
        surgery: Attached with a method of `gs.methods.quarantine` that has a score.
        loss: The scalar about to be differentiated.
        batch: Brings the column of rollouts, if the score goes by them.

    Returns:
        The flags, bool ``[batch]`` or ``[batch, token]``.

    Raises:
        PlanError: no score, or no forward that waits for it.
    """
    routes = [t for p in surgery.method.passes for t in p.under if isinstance(t, Route) and t.score is not None]
    waiting = [route for route in routes if (now := route.gate.get("now")) is not None and now.scoring]
    if len(waiting) != 1:
        raise PlanError(
            "decide: no forward of this surgery waits for a score; run one inside surgery.running('train', batch)."
        )
    (route,) = waiting
    decision = route.gate["now"]
    decision.decide(loss, batch or {}, keep_graph=route.mode == "route")
    assert decision.scored is not None
    return decision.scored
