"""Gradient routing: activations of units keep their value and pass no gradient back.

``h <- stop_gradient(h)`` at the units' activations (Cloud et al. 2024, arXiv 2410.04332, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from gradsurgery.anatomy.units import Units
from gradsurgery.transforms.base import OnUnits, Traits, Where


@dataclass(frozen=True, eq=False)
class Detach(OnUnits):
    """Stop the gradient behind the activations of ``units``, where their consumer reads them.

    Flagged rows train neither the units' producers nor anything before them through these units; the consumer's columns
    still receive their gradient, as in the original.

    Args:
        units: Units of an anatomy (``anatomy.units_within(region)`` for plain regions).
        where: Bool column ``[batch]`` or ``[batch, token]`` by name, or a tensor; ``None`` flags every row.

    Raises:
        SelectionError: no units, or a plain region.

    Example:
        >>> with gs.applied(model, gs.detach(anatomy.heads[:, :-1])):
        ...     model(**batch).loss.backward()
    """

    kind = "detach"
    traits = Traits(linear=True, per_example=True, idempotent=True, value_preserving=True)


def detach(units: Units, where: Where = None) -> Detach:
    """The activations of ``units`` keep their value and pass no gradient back; see `Detach`."""
    return Detach(units, where)
