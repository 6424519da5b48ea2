"""Activation masking: the activations of units are zero where their consumer reads them.

``h <- 0`` at the units' activations (retain and activation-masking modes of SGTM: arXiv 2512.05648, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from gradsurgery.anatomy.units import Units
from gradsurgery.transforms.base import OnUnits, Traits, Where


@dataclass(frozen=True, eq=False)
class Zero(OnUnits):
    """Run flagged rows as if ``units`` were removed: forward value and all gradients through them are zero.

    For closed units this equals ``gs.ablate_`` on those rows.

    Args:
        units: Units of an anatomy (``anatomy.units_within(region)`` for plain regions).
        where: Bool column ``[batch]`` or ``[batch, token]`` by name, or a tensor; ``None`` flags every row.

    Raises:
        SelectionError: no units, or a plain region.

    Example:
        >>> with gs.applied(model, gs.zero(anatomy.neurons[:, -16:])):
        ...     loss = model(**batch).loss
    """

    kind = "zero"
    traits = Traits(linear=True, per_example=True, idempotent=True)


def zero(units: Units, where: Where = None) -> Zero:
    """The activations of ``units`` are zero where their consumer reads them; see `Zero`."""
    return Zero(units, where)
