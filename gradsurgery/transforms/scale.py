"""Gradient scaling: a pass that sends ``factor`` times its gradient to a region.

Any real factor: negative ones unlearn (Cloud et al. 2024, arXiv 2410.04332, section 4: -0.75 on routed tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradsurgery.anatomy.region import Region
from gradsurgery.errors import PlanError
from gradsurgery.transforms.base import OnRegion, Traits, Where, describe_where


@dataclass(frozen=True, eq=False)
class Scale(OnRegion):
    """Multiply what this pass sends to ``region``: ``g[region] <- factor * g[region]`` for flagged rows.

    The forward value is unchanged. Under Adam a constant scale of *everything* an entry receives does nothing, since
    the update is invariant under it; the scale matters relative to other rows and passes.

    Args:
        region: Entries that receive ``factor`` times the gradient.
        factor: Any finite real, ``"1/passes"``: one over the number of passes that run in this step, or ``"passes"``:
            that number, which undoes ``gs.Pass(weight="1/passes")`` for ``region``.
        where: Bool column ``[batch]`` or ``[batch, token]`` by name, or a tensor; ``None`` flags every row.

    Raises:
        SelectionError: ``region`` is empty, or (when the plan is built) holds no entry that trains.
        PlanError: ``factor`` is no finite real.

    Example:
        >>> with gs.applied(model, gs.scale(anatomy.neurons[0, :], -0.75)):
        ...     model(**batch).loss.backward()
    """

    traits = Traits(linear=True, per_example=True, value_preserving=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor not in ("1/passes", "passes") and (
            isinstance(self.factor, str) or not math.isfinite(self.factor)
        ):
            raise PlanError(f'scale takes a finite number, "1/passes" or "passes", not {self.factor!r}.')

    def describe(self) -> str:
        return super().describe()[:-1] + f", {self.factor}{describe_where(self.where)})"


def scale(region: Region, factor: float | str, where: Where = None) -> Scale:
    """This pass sends ``factor`` times the gradient to ``region``; see `Scale`."""
    return Scale(region, factor, where)
