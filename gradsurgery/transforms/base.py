"""What a transform is: immutable data, its stage, and the traits that say where it is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.units import Units, require_units
from gradsurgery.errors import BatchError, PlanError, SelectionError

Stage = Literal["weights", "forward", "gradient", "update"]
Where = str | Tensor | Mapping[str, "str | Tensor"] | None
"""Name of a bool column of the batch, or a bool tensor, ``[batch]`` or ``[batch, token]``; ``None`` flags every row.
A mapping gives one per part of the model (``{"encoder": …, "decoder": …}``)."""


@dataclass(frozen=True)
class Traits:
    """What holds for a transform; the property tests run the assertions, plans refuse stages where one is missing.

    Attributes:
        linear: ``T(a + b) = T(a) + T(b)``: commutes with accumulation and reduction, so it may run in a pass.
        per_example: Can act on flagged examples only.
        idempotent: ``T(T(g)) = T(g)``.
        norm_nonincreasing: ``|T(g)| <= |g|``.
        self_inverse: ``T(T(x)) = x``.
        value_preserving: Leaves the forward value as it is.
        stateful: Keeps state across steps.
    """

    linear: bool = False
    per_example: bool = False
    idempotent: bool = False
    norm_nonincreasing: bool = False
    self_inverse: bool = False
    value_preserving: bool = False
    stateful: bool = False


class Transform:
    """Base of all transforms: frozen dataclasses with a ``stage`` and ``traits``."""

    stage: ClassVar[Stage]
    traits: ClassVar[Traits]

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def regions(self) -> Iterable[Region]:
        """The regions the transform speaks of, for checks and reports."""
        return ()

    def reads(self) -> Iterable[str]:
        """The slots that must be filled before."""
        return ()

    def fills(self) -> Iterable[str]:
        """The slots that are filled afterwards."""
        return ()

    def describe(self) -> str:
        """One line for ``Method.explain`` and run configs."""
        return f"{self.name}({', '.join(r.text or f'{r.numel():,} entries {r.digest}' for r in self.regions())})"


@dataclass(frozen=True)
class WeightEffect:
    """This pass's gradient of ``entries`` of parameter ``name`` is multiplied by ``factor`` for flagged rows."""

    name: str
    entries: Entries
    factor: float | str
    where: Where


@dataclass(frozen=True)
class InputEffect:
    """Flagged rows of the activations that the consumer ``entries`` of ``name`` read are zeroed or detached."""

    name: str
    entries: Entries
    kind: Literal["zero", "detach"]
    where: Where


Effect = WeightEffect | InputEffect


class ForwardTransform(Transform):
    """A transform inside the graph of one pass, as a list of effects on single parameters."""

    stage = "forward"
    where: Where

    def effects(self) -> list[Effect]:
        raise NotImplementedError


def describe_where(where: Where) -> str:
    if where is None:
        return ""
    return f", where={where!r}" if isinstance(where, str) else ", where=<tensor>"


@dataclass(frozen=True, eq=False)
class OnRegion(ForwardTransform):
    """A forward transform of what a pass sends to a region: ``g[region] <- factor * g[region]`` for flagged rows."""

    region: Region
    factor: float | str
    where: Where = None

    def __post_init__(self) -> None:
        require_entries(self.region, self.name)
        require_where(self.where, self.name)

    def effects(self) -> list[Effect]:
        return [WeightEffect(name, part, self.factor, self.where) for name, part in self.region.entries.items()]

    def regions(self) -> Iterable[Region]:
        return (self.region,)


@dataclass(frozen=True, eq=False)
class OnUnits(ForwardTransform):
    """A forward transform of the activations of units, where their consumer reads them."""

    units: Units
    where: Where = None
    kind: ClassVar[Literal["zero", "detach"]]

    def __post_init__(self) -> None:
        require_units(self.units, self.name)
        require_where(self.where, self.name)

    def effects(self) -> list[Effect]:
        consumers = self.units.consumers.entries
        return [InputEffect(name, part, self.kind, self.where) for name, part in consumers.items()]

    def regions(self) -> Iterable[Region]:
        return (self.units,)

    def describe(self) -> str:
        return super().describe()[:-1] + describe_where(self.where) + ")"


def require_entries(region: Region, what: str) -> Region:
    """``region`` if it holds entries; otherwise a ``SelectionError``."""
    if not isinstance(region, Region):
        raise SelectionError(
            f"{what} takes a region, not {type(region).__name__}; gs.region(model, names) selects by name."
        )
    if not region.numel():
        raise SelectionError(f"{what}: region {region.text or 'given'} is empty, so nothing would happen.")
    return region


def require_where(where: Where, what: str) -> None:
    """Raise unless ``where`` can name rows: ``PlanError`` for other types, ``BatchError`` for other tensors."""
    parts = where.values() if isinstance(where, Mapping) and all(isinstance(k, str) for k in where) else [where]
    if not parts:
        raise PlanError(f"{what}: where={{}} names no part of the model; None flags every row.")
    for part in parts:
        if isinstance(part, Tensor):
            if part.dtype != torch.bool or part.dim() not in (1, 2):
                raise BatchError(
                    f"{what}: where must be a bool tensor [batch] or [batch, token], not {part.dtype} "
                    f"{list(part.shape)}."
                )
        elif not isinstance(part, str) and (part is not None or part is not where):
            raise PlanError(
                f"{what}: where is the name of a bool column, a bool tensor [batch] or [batch, token], a mapping of "
                f"those by part of the model, or None; not {type(part).__name__}."
            )
