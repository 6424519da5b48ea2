"""One real block after its block in the twin: unit counts, run lengths, index arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gradsurgery.errors import AnatomyError

from .draft import Draft
from .expert_plan import carried_experts, carried_members, count_at
from .layout import Part, lengths_of, runs_of, starts_in
from .names import Shapes
from .patterns import blocks_at, classes_at, shared_at


class Undetermined(AnatomyError):
    """More than one run length is open; another tensor may settle it."""


class Plan:
    """Unit counts, run lengths and index arrays of one real block."""

    def __init__(self, drafts: list[Draft], small: Shapes, large: Shapes, heads: dict[int, int], fused: bool) -> None:
        self.small, self.large, self.heads = small, large, heads
        self.order = drafts
        self.experts = [d for d in drafts if d.kind == "expert"]
        self.members = sorted((d for d in drafts if d.expert is not None and fused), key=lambda d: d.expert or 0)
        self.plain = [d for d in drafts if d.kind != "expert" and not (d.expert is not None and fused)]
        self.counts: dict[str, int] = {}
        self.lengths: dict[tuple[str, ...], dict[int, int]] = {}

    def drafts(self) -> list[Draft]:
        self._learn_lengths()
        found = {id(draft): self._scaled(draft) for draft in self.plain}
        groups = {_names(d): found[id(d)] for d in self.plain if d.kind == "kv_group"}
        experts = [carried_experts(draft, self.small, self.large) for draft in self.experts]
        ordered: list[Draft] = []
        told = False
        for draft in self.order:
            if id(draft) in found:
                own = found[id(draft)]
                shared = groups.get(_names(own.parent)) if own.parent is not None else None
                ordered.append(replace(own, parent=shared) if shared is not None else own)
            elif any(draft is m for m in self.members) and not told:
                ordered.extend(self._members(experts))
                told = True
        return [*ordered, *experts]

    def _members(self, experts: list[Draft]) -> Iterator[Draft]:
        """Neurons of experts that share tensors."""
        own = {s.name for s in self.members[0].slots}
        total = next((d.count for d in experts if own <= {s.name for s in d.slots}), None)
        if total is None:
            raise AnatomyError(f"{self.members[0].block}: neurons of experts without experts")
        return carried_members(self.members, total, self.small, self.large)

    def _learn_lengths(self) -> None:
        """Solve the run lengths one by one: tensors with one unknown first."""
        shared = [d for d in self.plain if d.kind in ("head", "kv_group")]
        places = [(d, str(s.name), dim) for d in shared for s in d.slots for dim in s.index]
        while places:
            left = []
            for draft, name, dim in places:
                try:
                    self._index(name, dim, draft, self._count(draft))
                except Undetermined:  # noqa: PERF203
                    left.append((draft, name, dim))
            if len(left) == len(places):
                return
            places = left

    def _scaled(self, draft: Draft) -> Draft:
        count = self._count(draft)
        slots = []
        for slot in draft.slots:
            index = {dim: self._index(str(slot.name), dim, draft, count) for dim in slot.index}
            slots.append(replace(slot, index=index))
        parents = draft.parent_units
        if parents is not None and draft.parent is not None:
            parents = blocks_at(parents, count, self._count(draft.parent))
        classes = classes_at(draft, count, parents)
        return replace(draft, slots=tuple(slots), count=count, parent_units=parents, classes=classes)

    def _count(self, draft: Draft) -> int:
        """Units at real size: where a tensor has one line a unit its shape says so, else the config's head counts."""
        try:
            return count_at(draft, self.small, self.large)
        except AnatomyError:
            if draft.kind not in ("head", "kv_group"):
                raise
        if not self.heads.get(draft.count):
            raise AnatomyError(f"{draft.block}: the number of {draft.kind}s at real size is unknown")
        return self.heads[draft.count]

    def _families(self, name: str, draft: Draft) -> dict[str, Draft]:
        """The groups that share a tensor with ``draft``, finest first."""
        kin = (
            [d for d in self.plain if d.kind in ("head", "kv_group")] if draft.kind in ("head", "kv_group") else [draft]
        )
        kin = sorted(kin, key=lambda d: d.kind != "head")
        if draft.kind == "head" and draft.parent is None:
            kin = [draft]
        return {f"{d.kind}{i}": d for i, d in enumerate(kin) if any(s.name == name for s in d.slots)}

    def _index(self, name: str, dim: int, draft: Draft, count: int) -> np.ndarray:
        """Index array of one slot at real size."""
        size, real = self.small[name][dim], self.large[name][dim]
        mine = next(slot.index[dim] for slot in draft.slots if slot.name == name)
        if draft.count > 1 and size == real and (mine == mine[:1]).all():  # one of several matrices in a stack
            return np.tile(mine[:1], (count, 1))
        if (together := shared_at(mine, count, size, real)) is not None:
            return together
        families = self._families(name, draft)
        owners, groups, real_groups, counts = {}, {}, {}, {}
        for label, member in families.items():
            own = next(s for s in member.slots if s.name == name).index.get(dim)
            if own is None:
                own = np.arange(size)[None]
            owner = np.full(size, -1)
            owner[own] = np.arange(member.count)[:, None]
            owners[label], counts[label] = owner, self._count(member)
            if member.parent_units is not None and member.parent is not None:
                groups[label] = np.array(member.parent_units)
                parents = blocks_at(member.parent_units, counts[label], self._count(member.parent))
                real_groups[label] = np.array(parents)
        runs = runs_of(size, owners, groups)
        family = _family(draft) if draft.kind in ("head", "kv_group") else None
        lengths = self._solve(lengths_of(runs), counts, real, name, family)
        starts, filled = starts_in(runs, lengths, counts, real_groups)
        if filled != real:
            raise AnatomyError(f"{name}: units fill {filled} of {real} entries of dimension {dim}")
        return self._collect(draft, families, starts, lengths, real_groups, count)

    def _solve(
        self, small: dict[Part, int], counts: dict[str, int], real: int, name: str, family: tuple[str, ...] | None
    ) -> dict[Part, int]:
        """Real run lengths: known ones by their length in the twin, at most one unknown from the size."""
        if family is None:
            unknown = {length for part, length in small.items() if not part[0]}
            table = {length: length for part, length in small.items() if part[0]}
        else:
            table = self.lengths.setdefault(family, {1: 1})
            unknown = {length for part, length in small.items() if length not in table or not part[0]}
        known = sum(counts.get(p[0], 1) * table[n] for p, n in small.items() if n not in unknown)
        if len(unknown) > 1:
            raise Undetermined(f"{name}: several run lengths are unknown at real size")
        if unknown:
            weight = sum(counts.get(p[0], 1) for p, n in small.items() if n in unknown)
            if (real - known) % weight or real <= known:
                raise AnatomyError(f"{name}: {real} entries do not divide into its units")
            solved = {unknown.pop(): (real - known) // weight}
        else:
            solved = {}
        if family is not None:
            table.update(solved)
        table = {**table, **solved}
        return {part: table[length] for part, length in small.items()}

    @staticmethod
    def _collect(
        draft: Draft, families: dict[str, Draft], starts: dict, lengths: dict, groups: dict, count: int
    ) -> np.ndarray:
        columns: list[np.ndarray] = []
        for part, begin in starts.items():
            member = families.get(part[0])
            if member is None:
                continue
            positions = begin[:, None] + np.arange(lengths[part])
            if member is draft:
                columns.append(positions)
            elif draft.kind == "kv_group" and part[0] in groups:
                order = np.argsort(groups[part[0]], kind="stable")
                columns.append(positions[order].reshape(count, -1))
        return np.sort(np.concatenate(columns, axis=1), axis=1).astype(np.int64)


def _family(draft: Draft) -> tuple[str, ...]:
    """The consumers of a group of heads, which those that share keys and values have in common."""
    return tuple(sorted(str(s.name) for s in draft.slots if s.role == "consumer"))


def _names(draft: Draft) -> tuple[str, ...]:
    return tuple(str(s.name) for s in draft.slots)
