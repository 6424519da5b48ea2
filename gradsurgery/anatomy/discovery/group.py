"""From coupled lines to units: level sets of the columns.

Columns that share a line belong together. Single columns are neurons; where longer tiles appear they are heads, the
finest tiling that private lines give; what several heads share joins them into a KV group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from .coordinates import Index
from .coupling import Lines
from .crossing import merged, met
from .draft import Draft, Slot, tiles_from_labels
from .node import Node

Biases = dict[str, list[tuple[str, int]]]
"""Weight -> its biases, and for each the dimension of the weight that it runs along."""


@dataclass
class Cluster:
    """Activations whose columns are written by common lines, side by side."""

    nodes: list[Node]
    lines: list[list[Lines]]

    @property
    def columns(self) -> int:
        return sum(node.columns for node in self.nodes)

    def sets(self) -> dict[str, tuple[Lines, np.ndarray, np.ndarray]]:
        """``name -> (lines, bool [columns, lines] of local lines, the same of those dense in an activation)``."""
        starts = np.cumsum([0] + [node.columns for node in self.nodes])
        merged: dict[str, tuple[Lines, np.ndarray, np.ndarray]] = {}
        for start, found in zip(starts, self.lines, strict=False):
            for lines in found:
                key = lines.name
                if key in merged and merged[key][0].dims != lines.dims:
                    if not lines.dense.all():
                        merged.pop(key)
                    else:
                        continue
                if key not in merged:
                    shape = (self.columns, lines.sets.shape[1])
                    merged[key] = lines, np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
                elif merged[key][0].dims == lines.dims:
                    merged[key] = (joined(merged[key][0], lines), *merged[key][1:])
                merged[key][1][start : start + len(lines.sets)] |= lines.sets & ~lines.dense
                merged[key][2][start : start + len(lines.sets)] |= lines.sets & lines.dense
        return merged


def both(one: list[Lines], other: list[Lines]) -> list[Lines]:
    """What writes the columns of either of two activations that the same weights read."""
    found = {(line.name, line.dims, len(line.dense)): line for line in one}
    for line in other:
        key = line.name, line.dims, len(line.dense)
        if key in found:
            known = joined(found[key], line)
            line = replace(known, sets=known.sets | line.sets, dense=known.dense | line.dense)
        found[key] = line
    return list(found.values())


def joined(one: Lines, other: Lines) -> Lines:
    """The first, touched wherever either is: experts that read one activation each are one tensor together."""
    both = {d: np.union1d(rows, other.touched[d]) for d, rows in one.touched.items() if d in other.touched}
    return replace(one, touched={d: rows for d, rows in both.items() if len(rows) < one.shape[d]})


def clusters_of(nodes: list[Node], lines: list[list[Lines]]) -> list[Cluster]:
    """Join the activations that are written by a common local line; what the same weights read twice is one."""
    kept: list[tuple[Node, list[Lines]]] = []
    seen: dict[tuple, int] = {}
    for node, found in zip(nodes, lines, strict=True):
        key = tuple((r.name, r.view.storage_offset(), tuple(r.view.shape), r.view.stride()) for r in node.reads)
        if not found:
            continue
        if key in seen:
            first, known = kept[seen[key]]
            kept[seen[key]] = first, both(known, found)
        else:
            seen[key] = len(kept)
            kept.append((node, found))
    owner: list[int] = list(range(len(kept)))
    for i, (_, ours) in enumerate(kept):
        for j, (_, theirs) in enumerate(kept[:i]):
            if any(_share(a, b) for a in ours for b in theirs):
                owner = [owner[j] if o == owner[i] else o for o in owner]
    groups = [[k for k, o in enumerate(owner) if o == root] for root in dict.fromkeys(owner)]
    return [Cluster([kept[k][0] for k in ks], [kept[k][1] for k in ks]) for ks in groups]


def _share(a: Lines, b: Lines) -> bool:
    if a.name != b.name or a.dims != b.dims:
        return False
    if a.touched.keys() == b.touched.keys() and any(not set(a.touched[d]) & set(b.touched[d]) for d in a.touched):
        return False
    return bool(((a.sets.any(0) & ~a.dense) & (b.sets.any(0) & ~b.dense)).any())


def drafts_of(
    cluster: Cluster,
    block: str,
    biases: Biases,
    weights: set[str],
    elsewhere: set[str],
    sparse: frozenset[str] = frozenset(),
) -> list[Draft]:
    """Units of a cluster, finest last; empty where nothing is local.

    ``sparse``: tensors much of which these inputs do not reach; what of them belongs to a unit cannot be said.

    Columns side by side that different weights write (a concatenation) are groups of their own.
    """
    sets = cluster.sets()
    local = [matrix[:, matrix.any(0)] for name, (_, matrix, _) in sets.items() if name in weights]
    every = np.concatenate(local, axis=1) if local else np.zeros((cluster.columns, 0), dtype=bool)
    if every.shape[1] == 0:
        return []
    families, counts = unique_columns(every)
    coarse = _components(families)
    together = np.concatenate([families, np.stack([written.any(1) for written in local], axis=1)], axis=1)
    maker = _Maker(cluster, sets, block, biases, elsewhere, sparse)
    parts = _components(together)
    found = []
    for part in np.unique(parts):
        inside = (families & (parts == part)[:, None]).any(0)
        labels = np.where(parts == part, coarse, -1)
        if inside.any():
            found.extend(_part(maker, families[:, inside], counts[inside], labels, weights))
    return found


def _part(
    maker: _Maker, families: np.ndarray, counts: np.ndarray, coarse: np.ndarray, weights: set[str]
) -> list[Draft]:
    """Units of the columns of a cluster that have a label."""
    cluster, sets = maker.cluster, maker.sets
    inside = coarse >= 0
    reads = {read.name for node in cluster.nodes for read in node.reads}
    dense = {name for name, (_, _, mask) in sets.items() if mask[inside].any() and name not in reads}
    sizes = _sizes(families, cluster.nodes)
    units = len(tiles_from_labels(coarse))
    if sizes.max() <= 1:
        written = {n for n in dense if not sets[n][1][inside].any() and len(sets[n][0].shape) > 1}
        if written:  # one head only: its queries and keys write every column
            return [maker.draft("head", np.where(inside, 0, -1), shared=True)]
        met_units = maker.joined(coarse)
        if 1 < len(tiles_from_labels(met_units)) < units:
            return [maker.draft("head", met_units)]  # blocks of a block-diagonal weight
        return maker.by_expert(maker.draft("neuron", coarse), coarse)
    fine = _finest(families, counts, sizes, cluster.nodes, inside)
    common = {n for n in dense - maker.elsewhere if n in weights and len(sets[n][0].shape) > 1}
    if fine is None or len(tiles_from_labels(fine)) == units:
        if not common or units == 1:
            return [maker.draft("head", coarse, shared=units == 1)]
        fine, coarse = coarse, np.where(inside, 0, -1)  # rows that all heads share make them one group
    parents = [int(coarse[tile[0]]) for tile in tiles_from_labels(fine)]
    order = list(dict.fromkeys(coarse[inside].tolist()))
    group = maker.draft("kv_group", coarse, shared=len(order) == 1)
    heads = maker.draft("head", fine)
    parent_units = tuple(order.index(p) for p in parents)
    shapes = maker.shapes()
    held = {str(s.name): _entries(s, shapes[str(s.name)], heads.count) for s in heads.slots if s.role == "producer"}
    produced = [s for s in group.slots if s.role == "producer"]
    if all(_entries(s, shapes[str(s.name)], group.count) <= held.get(str(s.name), 0) for s in produced):
        return [heads]
    return [group, replace(heads, parent=group, parent_units=parent_units)]


def _entries(slot: Slot, shape: tuple[int, ...], count: int) -> int:
    """Entries that all units together hold."""
    sizes = [slot.index[d].shape[1] if d in slot.index else n for d, n in enumerate(shape)]
    return count * int(np.prod(sizes))


def _sizes(families: np.ndarray, nodes: list[Node]) -> np.ndarray:
    """Most columns that a family has in one activation."""
    starts = np.cumsum([0] + [node.columns for node in nodes])
    return np.max([families[a:b].sum(0) for a, b in pairwise(starts)], axis=0)


def unique_columns(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different columns of a bool matrix, and how often each occurs."""
    packed = np.ascontiguousarray(np.packbits(matrix, axis=0).T)
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    return matrix[:, first], counts


def _components(families: np.ndarray) -> np.ndarray:
    """Label of each column; columns in one family share it."""
    labels = np.arange(len(families))
    changed = True
    while changed:
        changed = False
        for family in families.T:
            members = labels[family]
            if len(members) and members.min() != members.max():
                labels[np.isin(labels, members)] = members.min()
                changed = True
    return labels


def _finest(
    families: np.ndarray, counts: np.ndarray, sizes: np.ndarray, nodes: list[Node], inside: np.ndarray
) -> np.ndarray | None:
    """Labels of the finest tiling by private lines: contiguous tiles first, then those that many lines share.

    Tiles cover an activation or leave it alone (-1): what else reads the values is no part of a single head.
    """
    candidates = []
    runs = (families[1:] & ~families[:-1]).sum(0) + families[0]
    starts = np.cumsum([0] + [node.columns for node in nodes])
    for size in np.unique(families.sum(0)[sizes > 1]):
        for contiguous in (True, False):
            chosen = (families.sum(0) == size) & (sizes > 1) & ((runs == runs.min()) == contiguous)
            tiles, weight = families[:, chosen], counts[chosen].min(initial=10**9)
            covered = [tiles[a:b].sum(1)[inside[a:b]] for a, b in pairwise(starts)]
            if chosen.any() and all((part == 1).all() or not part.any() for part in covered):
                missed = tiles.sum(1) == 0
                labels = np.where(missed, -1, tiles.argmax(1))
                missed = missed & inside
                candidates.append((not contiguous, not contiguous and weight < 2, missed.any(), size, labels))
    if not candidates:
        return None
    return min(candidates, key=lambda c: c[:4])[4]


def claimed(cluster: Cluster, weights: set[str]) -> tuple[dict[str, np.ndarray], set[str]]:
    """Entries that write one unit only (a mask that broadcasts to the tensor), and weights that write several."""
    sets = cluster.sets()
    local = [matrix[:, matrix.any(0)] for name, (_, matrix, _) in sets.items() if name in weights]
    labels = _components(unique_columns(np.concatenate(local, axis=1))[0])
    whole = labels.max() == labels.min()
    own: dict[str, np.ndarray] = {}
    common = set()
    for name, (lines, matrix, dense) in sets.items():
        some = matrix.any(0)
        spans = np.array([len(np.unique(labels[column])) for column in (matrix | dense).T])
        if some.any() and spans[some].min() == 1 and not (whole and name not in weights):
            shape = [n if d in lines.dims else 1 for d, n in enumerate(lines.shape)]
            own[name] = (some & (spans == 1)).reshape(shape)
        elif name in weights and len(lines.shape) > 1 and (dense.any() or some.any()):
            common.add(name)
    return own, common


class _Maker:
    """Turn labels of columns into slots: the lines inside each tile, and the columns that read it."""

    def __init__(
        self,
        cluster: Cluster,
        sets: dict,
        block: str,
        biases: Biases,
        elsewhere: set,
        sparse: frozenset[str],
    ) -> None:
        self.cluster, self.sets, self.block, self.biases = cluster, sets, block, biases
        self.elsewhere, self.sparse = elsewhere, sparse

    def bias_shapes(self) -> dict[str, tuple[int, ...]]:
        known = [(name, *place) for name, places in self.biases.items() if name in self.sets for place in places]
        return {bias: (self.sets[name][0].shape[dim],) for name, bias, dim in known}

    def joined(self, labels: np.ndarray) -> np.ndarray:
        """The labels with units joined that meet in one entry of a weight: what one writes and another reads."""
        tiles = tiles_from_labels(labels)
        units = met([*self._producers(tiles, False), *self._consumers(tiles)], self.shapes(), len(tiles))
        found = np.full_like(labels, -1)
        for tile, unit in zip(tiles, units, strict=True):
            found[tile] = unit
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        read = {r.name: tuple(r.parameter.shape) for node in self.cluster.nodes for r in node.reads}
        return read | {name: lines.shape for name, (lines, _, _) in self.sets.items()} | self.bias_shapes()

    def draft(self, kind: str, labels: np.ndarray, shared: bool = False) -> Draft:
        tiles = tiles_from_labels(labels)
        slots = merged([*self._producers(tiles, shared), *self._consumers(tiles)], self.shapes(), len(tiles))
        riders = tuple(
            dict.fromkeys(
                r.bias for n in self.cluster.nodes for r in n.reads if r.bias is not None and r.bias_view is not None
            )
        )
        return Draft(kind, self.block, tuple(slots), len(tiles), riders, uneven=self._uneven(tiles))

    def by_expert(self, draft: Draft, labels: np.ndarray) -> list[Draft]:
        """One draft an expert, where a batched product reads the neurons of all experts at once."""
        node = self.cluster.nodes[0]
        if not node.shared or len(self.cluster.nodes) > 1 or len(np.unique(labels)) != self.cluster.columns:
            return [draft]
        parts = np.split(np.arange(draft.count), node.shared)
        cut = lambda slot, part: replace(slot, index={d: rows[part] for d, rows in slot.index.items()})  # noqa: E731
        return [replace(draft, slots=tuple(cut(s, p) for s in draft.slots), count=len(p)) for p in parts]

    def _producers(self, tiles: list[np.ndarray], shared: bool) -> list[Slot]:
        slots = []
        for name, (lines, matrix, dense) in self.sets.items():
            if name in self.sparse:
                continue
            inside = _inside(matrix, dense, tiles)
            if shared and name not in self.elsewhere and (matrix.any() or len(lines.shape) > 1):
                inside = [written | dense.any(0) for written in inside]
            index = _rectangle([np.flatnonzero(written) for written in inside], lines)
            if index is not None:
                slots.append(Slot(name, index))
        for slot in list(slots):
            # the gradient of a key bias is rounding noise, so it follows its weight
            for bias, dim in self.biases.get(str(slot.name), ()):
                slots = [s for s in slots if s.name != bias]
                slots.append(Slot(bias, {0: slot.index[dim]} if dim in slot.index else {}))
        return slots

    def _uneven(self, tiles: list[np.ndarray]) -> tuple[str, ...]:
        """Tensors every written line of which writes one unit, but not as many lines for each unit."""
        found = []
        for name, (_, matrix, dense) in self.sets.items():
            inside = np.stack(_inside(matrix, dense, tiles))
            if not dense.any() and (inside.sum(0) == 1).all() and len(set(inside.sum(1))) > 1:
                found.append(name)
        return tuple(found)

    def _consumers(self, tiles: list[np.ndarray]) -> list[Slot]:
        starts = np.cumsum([0] + [node.columns for node in self.cluster.nodes])
        merged: dict[str, list[dict[int, set]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for start, node in zip(starts, self.cluster.nodes, strict=False):
            own = [tile[(tile >= start) & (tile < start + node.columns)] - start for tile in tiles]
            for read in node.reads:
                shapes[read.name] = tuple(read.parameter.shape)
                units = merged.setdefault(read.name, [{} for _ in tiles])
                for unit, columns in zip(units, own, strict=True):
                    for dim in range(len(shapes[read.name])):
                        rows = (
                            read.index[dim][columns].ravel().tolist()
                            if dim in read.index
                            else range(shapes[read.name][dim])
                        )
                        unit.setdefault(dim, set()).update(rows if len(columns) else ())
        slots = []
        for name, units in merged.items():
            index: Index = {}
            rows = [[sorted(unit[dim]) for unit in units] for dim in range(len(shapes[name]))]
            if any(len({len(r) for r in each}) != 1 or not each[0] for each in rows):
                continue
            for dim, size in enumerate(shapes[name]):
                if len(rows[dim][0]) < size:
                    index[dim] = np.array(rows[dim], dtype=np.int64)
            slots.append(Slot(name, index, "consumer"))
        return slots


def _inside(matrix: np.ndarray, dense: np.ndarray, tiles: list[np.ndarray]) -> list[np.ndarray]:
    """Per tile, ``bool [lines]``: writes columns of this tile only, in any activation."""
    every = matrix | dense
    total = every.sum(0)
    return [matrix[tile].any(0) & (every[tile].sum(0) == total) for tile in tiles]


def _rectangle(per_unit: list[np.ndarray], lines: Lines) -> Index | None:
    """Lines of each unit as one index array a dimension; ``None`` where units differ in size or hold nothing."""
    widths = {len(rows) for rows in per_unit}
    if len(widths) != 1 or widths == {0}:
        return None
    sizes = [lines.shape[d] for d in lines.dims]
    coordinates = np.unravel_index(np.stack(per_unit), sizes) if lines.dims else ()
    index: Index = {}
    total = 1
    for dim, values in zip(lines.dims, coordinates, strict=True):
        rows = [np.unique(row) for row in values]
        if len({len(r) for r in rows}) != 1:
            return None
        total *= len(rows[0])
        if len(rows[0]) < lines.shape[dim]:
            index[dim] = np.stack(rows).astype(np.int64)
    if total != next(iter(widths)):
        return None
    for dim, some in lines.touched.items():
        index[dim] = np.tile(some.astype(np.int64), (len(per_unit), 1))
    return index
