"""What every localisation experiment is compared with: plain training, and leaving the data out."""

from __future__ import annotations

from gradsurgery.losses import causal_lm
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss


def plain(loss: Loss = causal_lm) -> Method:
    """Every row trains everything."""
    return Method([Pass("plain", loss)])


def data_filter(forget: str = "forget", loss: Loss = causal_lm) -> Method:
    """Rows that carry the ``forget`` label are left out; undiscovered ones train like any other."""
    return Method([Pass("data_filter", loss, rows=f"~{forget}")])
