"""A direction of coordinates as vectors of parameters, where the adapter stands now."""

from __future__ import annotations

from torch import Tensor

from gradsurgery.adapters.handle import Handle
from gradsurgery.estimators.direction import Direction


class Toward:
    """What ``gs.project(away_from=…)`` reads: how the kept part's parameters would scale its coordinates.

    For a low-rank block ``B A`` the gains ``1 + v`` of its bottleneck are ``dB = B diag(v)`` or ``dA = diag(v) A``, and
    ``<dL/dB, B diag(v)> = <dL/dA, diag(v) A> = <f, v>`` with the gradient ``f`` in coordinates.

    Args:
        adapter: The adapter.
        direction: A direction of its coordinates.
    """

    def __init__(self, adapter: Handle, direction: Direction) -> None:
        adapter.require_direction(direction.fingerprint, direction.coordinates, "quarantine: the direction")
        direction.require_nonzero("quarantine")
        self.adapter, self.direction = adapter, direction

    @property
    def vectors(self) -> list[dict[str, Tensor]]:
        """One mapping from parameter names of the host an axis; layers without that axis are left out."""
        most = max(len(axes) for axes in self.direction.axes.values())
        out: list[dict[str, Tensor]] = []
        for k in range(most):
            found: dict[str, Tensor] = {}
            for layer, axes in self.direction.axes.items():
                if len(axes) > k and bool(axes[k].any()):
                    found |= self.adapter.toward(layer, axes[k])
            if found:
                out.append(found)
        return out

    def describe(self) -> str:
        return self.direction.describe()
