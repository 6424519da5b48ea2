"""What grouping hands to verification: units of one place, in names relative to nothing and shapes of the replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from .coordinates import Index


@dataclass(frozen=True, eq=False)
class Slot:
    """One slice of every unit: like a ``Footprint``, with what it is for.

    Args:
        role: ``"producer"``, ``"consumer"``, ``"router"``.
    """

    name: str | tuple[str, ...]
    index: Index
    role: str = "producer"
    buffer: bool = False


@dataclass(frozen=True, eq=False)
class Draft:
    """Candidate units: nothing here is believed before the swap test.

    Args:
        uneven: Tensors that the units share out among themselves in unequal parts, which no slot can hold.
        crossed: The units read each other through a weight of their own group; none can be exchanged alone.
    """

    kind: str
    block: str
    slots: tuple[Slot, ...]
    count: int
    riders: tuple[str, ...] = ()
    parent: Draft | None = None
    parent_units: tuple[int, ...] | None = None
    classes: tuple[int, ...] | None = None
    closed: bool = True
    expert: int | None = None
    crossed: bool = False
    uneven: tuple[str, ...] = ()

    def renamed(self, old: str, new: str) -> Draft:
        """The same units in another block of the same make."""

        def move(name: str) -> str:
            return new + name[len(old) :] if name.startswith(old + ".") else name

        return self.each(move)

    def each(self, move: Callable[[str], str]) -> Draft:
        """The same units under other names."""
        slots = tuple(
            replace(s, name=move(s.name) if isinstance(s.name, str) else tuple(map(move, s.name))) for s in self.slots
        )
        parent = self.parent.each(move) if self.parent is not None else None
        block = move(self.block + ".")[:-1] if self.block else self.block
        return replace(
            self,
            slots=slots,
            block=block,
            riders=tuple(map(move, self.riders)),
            uneven=tuple(map(move, self.uneven)),
            parent=parent,
        )


@dataclass
class Findings:
    """What coupling says of one block.

    Args:
        drafts: Candidate units.
        structural: Parameters explained without units: name -> why.
        claimed: Entries that write single units, and so must be in some: name -> mask that broadcasts to the tensor.
        common: Weights that write several units, and so are in a group of them or are shared by units that hold.
    """

    drafts: list[Draft] = field(default_factory=list)
    structural: dict[str, str] = field(default_factory=dict)
    claimed: dict[str, np.ndarray] = field(default_factory=dict)
    common: set[str] = field(default_factory=set)


def tiles_from_labels(labels: np.ndarray) -> list[np.ndarray]:
    """Columns of each label, in order of first appearance; -1 is no label."""
    order = dict.fromkeys(labels[labels >= 0].tolist())
    return [np.flatnonzero(labels == label) for label in order]
