"""What every localisation experiment is compared with: plain training, and leaving the data out."""

from __future__ import annotations

from gradsurgery.surgery import Method, Pass


def plain() -> Method:
    """Every row trains everything."""
    return Method([Pass("plain")])


def data_filter(forget: str = "forget") -> Method:
    """Rows that carry the ``forget`` label are left out; undiscovered ones train like any other."""
    return Method([Pass("data_filter", rows=f"~{forget}")])
