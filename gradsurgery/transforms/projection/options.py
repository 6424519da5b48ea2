"""What a projection does: options, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradsurgery.anatomy.region import Region
from gradsurgery.errors import PlanError
from gradsurgery.transforms.base import Traits, Transform, require_entries

Remove = Literal["both", "conflict", "agreement"]
Scope = Literal["global", "region", "module", "tensor", "row"]

REMOVE = ("both", "conflict", "agreement")
SCOPES = ("global", "region", "module", "tensor", "row")
METRICS = (None, "global", "module")


@dataclass(frozen=True, eq=False)
class Projection(Transform):
    """The options of `gs.project`; its subclasses act on a gradient or on an update."""

    slot: str = "main"
    away_from: Any = "protect"
    remove: Remove = "both"
    scope: Scope = "global"
    region: Region | Sequence[Region] | None = None
    park: str | None = None
    energy: float = 1.0
    max_cosine: float = 1.0
    keep_weight: float = 1.0
    removed_weight: float = 1.0
    floor: float = 0.0
    metrics: Literal["global", "module"] | None = None
    traits = Traits(idempotent=True, norm_nonincreasing=True)

    @property
    def name(self) -> str:
        return "project"

    def __post_init__(self) -> None:
        for field, known in (("remove", REMOVE), ("scope", SCOPES), ("metrics", METRICS)):
            if getattr(self, field) not in known:
                listed = ", ".join(map(repr, known))
                raise PlanError(f"project: {field} is one of {listed}, not {getattr(self, field)!r}.")
        for field in ("slot", "park"):
            value = getattr(self, field)
            if not (isinstance(value, str) and value) and not (field == "park" and value is None):
                raise PlanError(f"project: {field} is the name of a slot, not {value!r}.")
        for field, low, high in (("energy", 0.0, 1.0), ("max_cosine", 0.0, 1.0)):
            value = self._number(field)
            if not low < value <= high:
                raise PlanError(f"project: {field} lies above {low:g} and goes up to {high:g}; {value!r} does not.")
        for field in ("keep_weight", "removed_weight", "floor"):
            self._number(field)
        if self.floor < 0:
            raise PlanError(f"project: floor is a share of the slot's norm from 0 on, not {self.floor!r}.")
        self._check_regions()
        self._check_references()

    def _number(self, field: str) -> float:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise PlanError(f"project: {field} is a finite number, not {value!r}.")
        return float(value)

    def _check_regions(self) -> None:
        if self.region is not None and not isinstance(self.region, Region):
            object.__setattr__(self, "region", tuple(self.region))
        for region in self.regions():
            require_entries(region, "project")
        if self.scope == "region" and not self.regions():
            raise PlanError('project(scope="region") projects each of some regions by itself; give them as region=[…].')
        chosen = list(self.regions())
        for k, one in enumerate(chosen):
            for other in chosen[:k]:
                if one & other:
                    raise PlanError(
                        f"project: the regions {other.text or 'given'} and {one.text or 'given'} overlap; a block's "
                        f"entries belong to it alone."
                    )

    def _check_references(self) -> None:
        given = self.sources
        if not given:
            raise PlanError("project: away_from names no slot and holds no vectors.")
        for source in given:
            if isinstance(source, str) and source == self.slot:
                raise PlanError(f"project: nothing is left of slot {source!r} away from itself.")
            if not isinstance(source, str) and not hasattr(source, "vectors"):
                raise PlanError(
                    f"project: away_from takes names of slots, or objects with .vectors (a gradient memory), not "
                    f"{type(source).__name__}."
                )
        if self.park is not None and self.park in (self.slot, *given):
            raise PlanError(f"project: slot {self.park!r} is read by the projection, so nothing can be parked there.")
        several = len(given) > 1 or not isinstance(given[0], str)
        if several and self.max_cosine < 1:
            raise PlanError("project: max_cosine is the cosine to one slot; with several vectors there is none.")
        if self.energy < 1 and self.remove != "both":
            raise PlanError(f'project: energy chooses a subspace, and remove={self.remove!r} needs none; use "both".')

    @property
    def sources(self) -> tuple[Any, ...]:
        """What is projected away from: slot names and objects with vectors."""
        one = not isinstance(self.away_from, (list, tuple))
        return (self.away_from,) if one else tuple(self.away_from)

    @property
    def label(self) -> str:
        """Name of the references in metrics."""
        return "+".join(s if isinstance(s, str) else str(getattr(s, "name", "memory")) for s in self.sources)

    def regions(self) -> tuple[Region, ...]:
        if self.region is None:
            return ()
        return (self.region,) if isinstance(self.region, Region) else tuple(self.region)

    def reads(self) -> Iterable[str]:
        """Slots that must be filled."""
        return (self.slot, *(source for source in self.sources if isinstance(source, str)))

    def fills(self) -> Iterable[str]:
        """Slots that are filled afterwards."""
        return (self.park,) if self.park is not None else ()

    def describe(self) -> str:
        away = ", ".join(
            repr(s) if isinstance(s, str) else s.describe() if hasattr(s, "describe") else type(s).__name__
            for s in self.sources
        )
        facts = [f"{self.slot!r} away from {away}", f"remove={self.remove!r}", f"scope={self.scope!r}"]
        if self.stage == "update":
            facts.append("at='update'")
        facts += [r.text or f"{r.numel():,} entries {r.digest}" for r in self.regions()]
        for field, default in _DEFAULTS.items():
            if (value := getattr(self, field)) != default:
                facts.append(f"{field}={value!r}")
        return f"project({', '.join(facts)})"


_DEFAULTS: dict[str, Any] = {
    "park": None,
    "energy": 1.0,
    "max_cosine": 1.0,
    "keep_weight": 1.0,
    "removed_weight": 1.0,
    "floor": 0.0,
    "metrics": None,
}
