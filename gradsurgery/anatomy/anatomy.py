"""The anatomy of a model: its unit groups, and everything that selects by them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gradsurgery.anatomy import store
from gradsurgery.anatomy.entries import Entries, all_bits, bits_of
from gradsurgery.anatomy.expression import parse_selection
from gradsurgery.anatomy.groups import UnitGroup
from gradsurgery.anatomy.indexing import PLURALS
from gradsurgery.anatomy.quantised import Quantised, permutable
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import select_names
from gradsurgery.anatomy.space import ParameterSpace, require_same_space
from gradsurgery.anatomy.units import Units, require_units

log = logging.getLogger("gradsurgery")


class Anatomy:
    """What ``gs.dissect`` found: the units of every layer, indexable as ``[layers, units]``.

    Attributes:
        groups: All unit groups, layer by layer.
        space: The model's parameter space.
        structural: Why a parameter belongs to no unit, by its name ("embedding", "norm", "router", …).
        seconds: How long the dissection took.
    """

    def __init__(
        self,
        space: ParameterSpace,
        groups: Sequence[UnitGroup],
        structural: Mapping[str, str] | None = None,
        seconds: float = 0.0,
    ) -> None:
        self.space, self.groups, self.seconds = space, tuple(groups), seconds
        self.structural = dict(structural or {})
        self._told: set[str] = set()

    @property
    def heads(self) -> Units:
        """Attention and state-space heads; a head without its whole KV group leaves the shared rows joint."""
        return self._all("head", "heads")

    @property
    def kv_groups(self) -> Units:
        """Heads counted by the key and value heads they share, shared rows included; ``heads`` where none share."""
        return self._all("head", "kv_groups", grain="kv_group")

    @property
    def neurons(self) -> Units:
        """MLP neurons; in a mixture of experts every expert is a group of its own."""
        return self._all("neuron", "neurons")

    @property
    def experts(self) -> Units:
        """Routed experts with their router rows."""
        return self._all("expert", "experts")

    @property
    def latents(self) -> Units:
        """Inner dimensions of low-rank products: ranks of adapters, compressed keys, values and queries."""
        return self._all("latent", "latents")

    def _all(self, kind: str, text: str, grain: str = "") -> Units:
        chosen = {g: all_bits(len(group)) for g, group in enumerate(self.groups) if group.kind == kind}
        return Units(self, chosen, grain or kind, None, text)

    @cached_property
    def num_layers(self) -> int:
        return max((group.layer for group in self.groups), default=-1) + 1

    def rest(self, units: Region) -> Units:
        """The other units of the groups that hold some of ``units``; their consumers' output biases ride along.

        Raises:
            SelectionError: ``units`` is a plain region, or empty.
        """
        units = require_units(units, "rest")
        require_same_space(units.space, self.space, f"region {units.text or 'given'}")
        chosen = {g: all_bits(len(self.groups[g])) & ~bits for g, bits in units.chosen.items()}
        names = {name for group, _ in units.groups for name in group.riders}
        riders = Region(self.space, {n: Entries.full(self.space.shapes[self.space.canonical(n)]) for n in names})
        return Units(self, chosen, units.grain, riders if riders else None, units.text and f"rest({units.text})")

    def units_within(self, region: Region) -> Units:
        """The heads, neurons and experts all of whose own entries lie in ``region``."""
        require_same_space(region.space, self.space, f"region {region.text or 'given'}")
        chosen = {}
        for g, group in enumerate(self.groups):
            if group.kind == "kv_group":
                continue
            inside = [u for u in range(len(group)) if self._inside(group, u, region)]
            if group.parent is not None:  # heads that complete a KV group would bring shared rows from outside
                parent, complete = self.complete_parents(group, np.asarray(inside, dtype=np.int64))
                over = [k for k in complete if not self._inside(parent, int(k), region)]
                inside = [u for u in inside if np.asarray(group.parent_units)[u] not in over]
            chosen[g] = bits_of(inside, len(group))
        return Units(self, chosen, "", None, region.text and f"units_within({region.text})")

    def _inside(self, group: UnitGroup, unit: int, region: Region) -> bool:
        for footprint in group.footprints:
            if footprint.buffer:
                continue
            name, index = footprint.slice_of(unit)
            name = self.space.canonical(name)
            if Entries.box(self.space.shapes[name], index) - region.of(name):
                return False
        return True

    def region(self, names: str | Sequence[str], exclude: str | Sequence[str] | None = None) -> Region:
        """Entries of whole parameters by name; see ``gs.region``."""
        return select_names(self.space, names, exclude)

    def structure(self, *kinds: str) -> Region:
        """The structural parameters of some kinds (``"embedding"``, ``"norm"``, ``"router"``, …); may be empty."""
        found = [name for name, why in self.structural.items() if why.startswith(kinds)]
        entries = {n: Entries.full(self.space.shapes[self.space.canonical(n)]) for n in found}
        return Region(self.space, entries, f"structure({', '.join(map(repr, kinds))})")

    def select(self, text: str) -> Region:
        """The region a text form speaks of, e.g. ``"heads[:, -1:] | neurons[:, -64:]"``."""
        return parse_selection(text, self)

    def parent_of(self, group: UnitGroup) -> UnitGroup:
        """The KV group that holds what the heads of ``group`` share."""
        return self._parents[group.layer, group.parent or ""]

    @cached_property
    def _parents(self) -> dict[tuple[int, str], UnitGroup]:
        return {(group.layer, group.name): group for group in self.groups if group.kind == "kv_group"}

    def complete_parents(self, group: UnitGroup, units: np.ndarray) -> tuple[UnitGroup, np.ndarray]:
        """The KV groups all of whose heads are among ``units``."""
        parents = np.asarray(group.parent_units)
        outside = np.setdiff1d(np.arange(len(group)), units)
        return self.parent_of(group), np.setdiff1d(np.unique(parents[units]), parents[outside])

    def say_shared(self, group: UnitGroup) -> None:
        """Say once a model that heads were chosen without the rest of their KV group."""
        if "shared" not in self._told:
            self._told.add("shared")
            log.warning(
                "%s: heads of %s share keys and values; heads chosen without their whole KV group leave the shared "
                "rows joint. anatomy.kv_groups takes all of it.",
                self.space.model,
                group.name,
            )

    @property
    def quantised(self) -> dict[str, Quantised]:
        """How the quantised parameters of the model are stored, by name; empty where none are."""
        return self.space.quantised

    def permutable(self, group: UnitGroup) -> tuple[int, ...]:
        """One int per unit of a group: equal means that the two can be swapped in the weights as they are stored.

        ``group.exchange_classes``, cut finer where weights are quantised: rows take their scales along, columns can be
        swapped inside one quantisation block, and units that fill whole blocks with each other.
        """
        return permutable(group, self.quantised)

    @property
    def fingerprint(self) -> str:
        return self.space.fingerprint

    def save(self, path: str | Path) -> None:
        """Write the anatomy as JSON, whole or not at all."""
        store.save_anatomy(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: object = None) -> Anatomy:
        """Read an anatomy; with ``model``, refuse one that was made for another.

        Raises:
            ArtefactError: missing, truncated, or made for another model.
        """
        return cls(*store.load_anatomy(Path(path), model))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Anatomy) and store.describe(self) == store.describe(other)

    __hash__ = object.__hash__

    def __str__(self) -> str:
        """Table: kinds x layers, units, parameters, share of the model."""
        rows = [("kind", "layers", "units a layer", "units", "parameters", "share", "exchangeable", "closed")]
        for kind, plural in PLURALS.items():
            groups = [group for group in self.groups if group.kind == kind]
            if not groups:
                continue
            region = getattr(self, plural)
            layers = sorted({group.layer for group in groups})
            sizes = Counter(sum(len(g) for g in groups if g.layer == layer) for layer in layers)
            free = all(len(set(g.exchange_classes)) < len(g) for g in groups if len(g) > 1)
            rows.append(
                (
                    plural,
                    f"{len(layers)} ({layers[0]}-{layers[-1]})",
                    " or ".join(map(str, sorted(sizes))),
                    f"{sum(map(len, groups)):,}",
                    f"{region.numel():,}",
                    f"{100 * region.fraction:.1f}%",
                    "yes" if free else "no",
                    "yes" if all(g.closed for g in groups) else "no",
                )
            )
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        head = f"{self.space.model}: {self.space.numel():,} parameters, fingerprint {self.fingerprint}"
        tail = []
        if self.structural:
            tail.append(
                f"structural: {', '.join(f'{why} {n}' for why, n in Counter(self.structural.values()).items())}"
            )
        tail.extend(f"quantised: {n} as {how}" for how, n in Counter(map(str, self.quantised.values())).items())
        return "\n".join([head, *lines, *tail])

    def __repr__(self) -> str:
        kinds = Counter(group.kind for group in self.groups)
        return f"Anatomy({self.space.model}: {', '.join(f'{n} {kind} groups' for kind, n in kinds.items())})"
