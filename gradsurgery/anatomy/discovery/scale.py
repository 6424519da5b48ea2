"""Groups found in a tiny twin, carried over to the real model and checked against its shapes.

Blocks are matched by what they hold, head counts come from the configs, run lengths from the real shapes; whatever is
not unambiguous raises.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from gradsurgery.errors import AnatomyError

from .coupling import block_of
from .draft import Draft, Slot
from .layout import Part, lengths_of, runs_of, starts_in
from .shrink import head_counts, head_factor

Shapes = dict[str, tuple[int, ...]]


class _Undetermined(AnatomyError):
    """More than one run length is open; another tensor may settle it."""


class Transfer:
    """From a twin's drafts to a real model's.

    Args:
        twin: The probed model.
        model: The real one; only names and shapes are read.
        drafts: Verified drafts of the twin.
    """

    def __init__(self, twin: nn.Module, model: nn.Module, drafts: list[Draft]) -> None:
        self.twin, self.model = twin, model
        self.small, self.large = _shapes(twin), _shapes(model)
        self.drafts = drafts
        self.by_block: dict[str, list[Draft]] = defaultdict(list)
        blocks = set(block_of(twin).values())
        for draft in drafts:
            self.by_block[_enclosing(draft.block, blocks)].append(draft)
        self.signatures: dict[tuple, list[str]] = defaultdict(list)
        for block in sorted(blocks, key=_natural):
            self.signatures[_signature(block, self.small)].append(block)
        self.cache: dict[tuple, list[Draft]] = {}
        self.sources: dict[str, str] = {}

    def carried(self) -> list[Draft]:
        """Drafts of the real model.

        Raises:
            AnatomyError: A block has no counterpart in the twin, or its shapes do not fit.
        """
        found: list[Draft] = []
        for block in sorted(set(block_of(self.model).values()), key=_natural):
            candidates = self.signatures.get(_signature(block, self.large))
            if not candidates:
                raise AnatomyError(
                    f"{block or type(self.model).__name__}: no block of its tiny twin holds the same parameters. "
                    "Declare its layout with gs.dissect(model, layouts=[...])."
                )
            source = max(candidates, key=lambda b: len(self.by_block[b]))
            self.sources[block] = source
            shapes = {n[len(block) :]: s for n, s in self.large.items() if n.startswith(block + ".") or not block}
            key = (source, tuple(sorted(shapes.items())))
            if key not in self.cache:
                self.cache[key] = self._block(source, block)
                found.extend(self.cache[key])
                self.cache[key] = [replace(d, block=block) for d in self.cache[key]]
            else:
                old = self.cache[key][0].block if self.cache[key] else block
                found.extend(d.renamed(old, block) for d in self.cache[key])
        return found

    def _block(self, source: str, block: str) -> list[Draft]:
        """Drafts of one real block after its source in the twin."""
        drafts = self.by_block[source]
        numbers = {d.expert for d in drafts if d.expert is not None}
        if len(numbers) == 1 and re.search(r"\.\d+\..*\.\d+$", source):  # experts that are elements of a list
            drafts = [replace(d, expert=int(block.rpartition(".")[2])) if d.expert is not None else d for d in drafts]
            numbers = set()
        moved = [d.renamed(source, block) for d in drafts]
        small = {block + n[len(source) :] if source else n: s for n, s in self.small.items() if _under(n, source)}
        plan = _Plan(moved, small, self.large, self._counts(source, drafts), bool(numbers))
        return plan.drafts()

    def _counts(self, source: str, drafts: list[Draft]) -> dict[int, int]:
        """Unit counts of head-like groups in the twin -> in the real model, from the nearest configs."""
        small, large = _config(self.twin, source), _config(self.model, source)
        counts: dict[int, int] = {}
        if small is None or large is None:
            return counts
        real = head_counts(large)
        by_size: dict[int, set[int]] = defaultdict(set)
        for name, value in head_counts(small).items():
            by_size[value].add(real.get(name, value))
        factor = head_factor(large)
        for draft in drafts:
            if draft.kind in ("head", "kv_group"):
                known = by_size.get(draft.count, set())
                counts[draft.count] = min(known) if len(known) == 1 else draft.count * (factor if draft.count > 1 else 1)
        return counts


class _Plan:
    """Unit counts, run lengths and index arrays of one real block."""

    def __init__(self, drafts: list[Draft], small: Shapes, large: Shapes, heads: dict[int, int], fused: bool) -> None:
        self.small, self.large, self.heads = small, large, heads
        self.experts = [d for d in drafts if d.kind == "expert"]
        self.members = sorted((d for d in drafts if d.expert is not None and fused), key=lambda d: d.expert or 0)
        self.plain = [d for d in drafts if d.kind != "expert" and not (d.expert is not None and fused)]
        self.counts: dict[str, int] = {}
        self.lengths: dict[int, int] = {1: 1}

    def drafts(self) -> list[Draft]:
        self._learn_lengths()
        found = [self._scaled(draft) for draft in self.plain]
        groups = {d.kind: d for d in found}
        found = [
            replace(d, parent=groups["kv_group"]) if d.parent is not None and "kv_group" in groups else d for d in found
        ]
        for draft in self.experts:
            found.append(self._expert(draft))
        if self.members:
            found.extend(self._members())
        return found

    def _learn_lengths(self) -> None:
        """Solve the run lengths one by one: tensors with one unknown first."""
        shared = [d for d in self.plain if d.kind in ("head", "kv_group")]
        places = [(d, str(s.name), dim) for d in shared for s in d.slots for dim in s.index]
        while places:
            left = []
            for draft, name, dim in places:
                try:
                    self._index(name, dim, draft, self._count(draft))
                except _Undetermined:
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
            parents = _blocks(parents, count, self._count(draft.parent))
        classes = _classes(draft, count, parents)
        return replace(draft, slots=tuple(slots), count=count, parent_units=parents, classes=classes)

    def _count(self, draft: Draft) -> int:
        if draft.kind in ("head", "kv_group"):
            if draft.count not in self.heads:
                raise AnatomyError(f"{draft.block}: the number of {draft.kind}s at real size is unknown")
            return self.heads[draft.count]
        sizes = set()
        for slot in draft.slots:
            for dim, rows in slot.index.items():
                if rows.shape[1] == 1 and len(np.unique(rows)) == draft.count == self.small[str(slot.name)][dim]:
                    sizes.add(self.large[str(slot.name)][dim])
        if len(sizes) != 1:
            raise AnatomyError(f"{draft.block}: the number of {draft.kind}s at real size is ambiguous: {sorted(sizes)}")
        return sizes.pop()

    def _families(self, name: str, draft: Draft) -> dict[str, Draft]:
        """The groups that share a tensor with ``draft``, finest first."""
        kin = [d for d in self.plain if d.kind in ("head", "kv_group")] if draft.kind in ("head", "kv_group") else [draft]
        kin = sorted(kin, key=lambda d: d.kind != "head")
        if draft.kind == "head" and draft.parent is None:
            kin = [draft]
        return {f"{d.kind}{i}": d for i, d in enumerate(kin) if any(s.name == name for s in d.slots)}

    def _index(self, name: str, dim: int, draft: Draft, count: int) -> np.ndarray:
        """Index array of one slot at real size."""
        size, real = self.small[name][dim], self.large[name][dim]
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
                parents = _blocks(member.parent_units, counts[label], self._count(member.parent))
                real_groups[label] = np.array(parents)
        runs = runs_of(size, owners, groups)
        lengths = self._solve(lengths_of(runs), counts, real, name, neuron=draft.kind not in ("head", "kv_group"))
        starts, filled = starts_in(runs, lengths, counts, real_groups)
        if filled != real:
            raise AnatomyError(f"{name}: units fill {filled} of {real} entries of dimension {dim}")
        return self._collect(draft, families, starts, lengths, real_groups, count)

    def _solve(self, small: dict[Part, int], counts: dict[str, int], real: int, name: str, neuron: bool) -> dict[Part, int]:
        """Real run lengths: known ones by their length in the twin, at most one unknown from the size."""
        if neuron:
            unknown = {length for part, length in small.items() if not part[0]}
            table = {length: length for part, length in small.items() if part[0]}
        else:
            table = self.lengths
            unknown = {length for part, length in small.items() if length not in table or not part[0]}
        known = sum(counts.get(p[0], 1) * table[n] for p, n in small.items() if n not in unknown)
        if len(unknown) > 1:
            raise _Undetermined(f"{name}: several run lengths are unknown at real size")
        elif unknown:
            weight = sum(counts.get(p[0], 1) for p, n in small.items() if n in unknown)
            if (real - known) % weight or real <= known:
                raise AnatomyError(f"{name}: {real} entries do not divide into its units")
            solved = {unknown.pop(): (real - known) // weight}
        else:
            solved = {}
        if not neuron:
            self.lengths.update(solved)
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

    def _expert(self, draft: Draft) -> Draft:
        if not isinstance(draft.slots[0].name, str):
            return self._listed(draft)
        count = self._count(draft)
        slots = []
        for slot in draft.slots:
            index = {}
            for dim, rows in slot.index.items():
                real = self.large[str(slot.name)][dim]
                width = rows.shape[1] if rows.shape[1] == 1 else real // count
                index[dim] = np.arange(count * width).reshape(count, width)
                if index[dim].max() >= real or (rows.max() + 1 == self.small[str(slot.name)][dim]) != (index[dim].max() + 1 == real):
                    raise AnatomyError(f"{slot.name}: {count} experts do not fit {real} entries")
            slots.append(replace(slot, index=index))
        return replace(draft, slots=tuple(slots), count=count, classes=_classes(draft, count, None))

    def _listed(self, draft: Draft) -> Draft:
        """Experts that are elements of a list: the real list is as long as its names say."""
        names = draft.slots[0].name
        head = str(names[0])[: _first_difference(str(names[0]), str(names[1]))].rstrip("0123456789")
        numbers = {int(m.group(1)) for n in self.large if (m := re.match(re.escape(head) + r"(\d+)\.", n))}
        count = len(numbers)
        slots = []
        for slot in draft.slots:
            if isinstance(slot.name, str):
                slots.append(replace(slot, index={d: np.arange(count)[:, None] for d in slot.index}))
            else:
                tail = str(slot.name[0])[len(head) + 1 :]
                slots.append(replace(slot, name=tuple(f"{head}{e}{tail}" for e in range(count))))
        return replace(draft, slots=tuple(slots), count=count, classes=_classes(draft, count, None))

    def _members(self) -> Iterable[Draft]:
        """Neurons of experts that share tensors: one template, shifted to every expert."""
        first, second = self.members[0], self.members[1]
        experts = next((d for d in self.experts if {s.name for s in first.slots} <= {s.name for s in d.slots}), None)
        if experts is None:
            raise AnatomyError(f"{first.block}: neurons of experts without experts")
        total = self._count(experts)
        template: list[tuple[Slot, dict[int, np.ndarray], dict[int, int]]] = []
        counts = set()
        for a, b in zip(first.slots, second.slots, strict=True):
            index, steps = {}, {}
            for dim, rows in a.index.items():
                size, real = self.small[str(a.name)][dim], self.large[str(a.name)][dim]
                constant = (rows == rows[:1]).all() and rows.shape[1] == 1
                if constant:
                    index[dim], steps[dim] = np.zeros((1, 1), dtype=np.int64), 1
                    continue
                flat = bool((b.index[dim] != rows).any())
                part, span = (size // len(self.members), real // total) if flat else (size, real)
                index[dim] = _neurons(rows, part, span, first.count)
                steps[dim] = span if flat else 0
                counts.add(len(index[dim]))
            template.append((a, index, steps))
        if len(counts) != 1:
            raise AnatomyError(f"{first.block}: experts disagree about their width: {sorted(counts)}")
        count = counts.pop()
        for number in range(total):
            slots = tuple(
                replace(s, index={d: np.repeat(v, count, 0) + number if len(v) == 1 < count and steps[d] == 1 else v + number * steps[d] for d, v in index.items()})
                for s, index, steps in template
            )
            yield replace(first, slots=slots, count=count, expert=number, classes=(0,) * count)


def _neurons(rows: np.ndarray, small: int, real: int, units: int) -> np.ndarray:
    """Rows of the neurons of one expert at real size: adjacent runs stay adjacent, halves stay halves."""
    width = rows.shape[1]
    count, left = divmod(real, small // units)
    if left or width * units != small:
        raise AnatomyError(f"{real} entries do not divide into neurons of {width} rows")
    owner = np.full(small, -1)
    owner[rows] = np.arange(units)[:, None]
    runs = runs_of(small, {"n": owner}, {})
    starts, _ = starts_in(runs, lengths_of(runs), {"n": count}, {})
    parts = [starts[p][:, None] + np.arange(n) for p, n in lengths_of(runs).items()]
    return np.sort(np.concatenate(parts, axis=1), axis=1)


def _classes(draft: Draft, count: int, parents: tuple[int, ...] | None) -> tuple[int, ...]:
    """Exchange classes at real size, by the pattern they show in the twin."""
    classes = draft.classes or (0,) * draft.count
    if len(set(classes)) == 1:
        return (0,) * count
    if parents is not None and classes == draft.parent_units:
        return parents
    if len(set(classes)) == draft.count:
        return tuple(range(count))
    number = len(set(classes))
    if draft.kind in ("head", "kv_group"):
        number = count * number // draft.count
    return _blocks(classes, count, number)


def _blocks(pattern: tuple[int, ...], count: int, number: int) -> tuple[int, ...]:
    """A pattern of equal blocks (or strides) of units, for ``count`` units in ``number`` blocks."""
    small = len(set(pattern))
    units = np.arange(len(pattern))
    if count % number == 0 and len(pattern) % small == 0:
        if tuple(units // (len(pattern) // small)) == tuple(pattern):
            return tuple((np.arange(count) // (count // number)).tolist())
        if tuple(units % small) == tuple(pattern):
            return tuple((np.arange(count) % number).tolist())
    raise AnatomyError(f"the classes {pattern} of the twin have no clear form at {count} units")


def _shapes(model: nn.Module) -> Shapes:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _natural(name: str) -> tuple:
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split("."))


def _canonical(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _signature(block: str, shapes: Shapes) -> tuple:
    inner = frozenset(_canonical(n[len(block) :]) for n in shapes if _under(n, block)) if block else frozenset()
    return _canonical(block), inner


def _under(name: str, block: str) -> bool:
    return not block or name.startswith(block + ".")


def _enclosing(scope: str, blocks: set[str]) -> str:
    while scope and scope not in blocks:
        scope = scope.rpartition(".")[0]
    return scope


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _config(model: nn.Module, path: str) -> Any:
    """Config of the innermost module around ``path`` that has one."""
    found, module = getattr(model, "config", None), model
    for part in path.split(".") if path else []:
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            break
        found = getattr(module, "config", None) or found
    return found
