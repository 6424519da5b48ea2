"""Gradient masking: a pass that sends no gradient to a region.

``g[region] <- 0`` for the flagged rows of this pass only (SGTM: Shilov et al. 2025, arXiv 2512.05648, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from gradsurgery.anatomy.region import Region
from gradsurgery.transforms.base import OnRegion, Traits, Where, describe_where


@dataclass(frozen=True, eq=False)
class Mask(OnRegion):
    """Keep this pass from updating ``region``.

    The forward value is unchanged. In the backward, the contribution of flagged rows to every entry of ``region`` is
    exactly zero (it is not computed), also where the incoming gradient is inf or nan; other rows and entries are
    untouched.

    Args:
        region: Entries that receive nothing.
        where: Bool column ``[batch]`` or ``[batch, token]`` by name, or a tensor; ``None`` flags every row.

    Raises:
        SelectionError: ``region`` is empty, or (when the plan is built) holds no entry that trains.

    Example:
        >>> forget = anatomy.heads[:, -1:] | anatomy.neurons[:, -16:]
        >>> is_forget = torch.tensor([True, False])
        >>> with gs.applied(model, gs.mask(anatomy.rest(forget), where=is_forget)):
        ...     model(**batch).loss.backward()
    """

    factor: float = 0.0
    traits = Traits(linear=True, per_example=True, idempotent=True, norm_nonincreasing=True, value_preserving=True)

    def describe(self) -> str:
        return super().describe()[:-1] + describe_where(self.where) + ")"


def mask(region: Region, where: Where = None) -> Mask:
    """This pass sends no gradient to ``region``; see `Mask`."""
    return Mask(region, where=where)
