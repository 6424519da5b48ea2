"""Groups found in a tiny twin, carried over to the real model and checked against its shapes.

Blocks are matched by what they hold, head counts come from the configs, run lengths from the real shapes; whatever is
not unambiguous raises.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
from torch import nn

from gradsurgery.errors import AnatomyError

from .build import config_of_class
from .draft import Draft
from .lengthen import lengthened
from .names import (
    aliases_of,
    canonical_of,
    config_of,
    enclosing_of,
    is_under,
    kinds_of,
    lengths_of,
    natural_of,
    shapes_of,
    signature_of,
    within,
)
from .partition import Inner, block_of
from .plan import Plan
from .shrink import head_counts, like_layers


class Transfer:
    """From a twin's drafts to a real model's.

    Args:
        twin: The probed model.
        model: The real one; only names and shapes are read.
        drafts: Verified drafts of the twin.
        inner: Lists of modules that hold no blocks, as the twin showed.
    """

    def __init__(self, twin: nn.Module, model: nn.Module, drafts: list[Draft], inner: Inner = frozenset()) -> None:
        self.twin, self.model = twin, model
        self.small, self.large = shapes_of(twin), shapes_of(model)
        self.within = within(self.large)
        self.drafts, self.inner = drafts, inner
        self.by_block: dict[str, list[Draft]] = defaultdict(list)
        blocks, self.blocks = set(block_of(twin, inner).values()), block_of(model, inner)
        self.ranks: dict[str, int] = {}
        for draft in drafts:
            block = enclosing_of(draft.block, blocks)
            self.by_block[block].append(draft)
            self.ranks.setdefault(canonical_of(block), len(self.ranks))
        self.shared = aliases_of(twin), aliases_of(model)
        self.signatures: dict[tuple, list[str]] = defaultdict(list)
        for block in sorted(blocks, key=natural_of):
            self.signatures[signature_of(block, self.small)].append(block)
        self.cache: dict[tuple, tuple[str, list[Draft]]] = {}
        self.lengths = lengths_of(self.small), lengths_of(self.large)
        self.sources: dict[str, str] = {}
        config = config_of_class(model)
        self.like = like_layers(config, kinds_of(model)) if config is not None else {}

    def carried(self) -> list[Draft]:
        """Drafts of the real model.

        Raises:
            AnatomyError: A block has no counterpart in the twin, or its shapes do not fit.
        """
        found: list[Draft] = []
        for block in sorted(
            set(self.blocks.values()), key=lambda b: (self.ranks.get(canonical_of(b), 0), natural_of(b))
        ):
            source, drafts = self._source(block)
            self.sources[block] = source
            found.extend(drafts)
        return found

    def _source(self, block: str) -> tuple[str, list[Draft]]:
        """The block of the twin that a real one is like, and its drafts at real size."""
        own = {name: self.large[name] for name in self.within[block]}
        candidates = [s for s in self.signatures.get(signature_of(block, own), ()) if self._is_at(s, block)]
        if not candidates:
            raise AnatomyError(
                f"{block or type(self.model).__name__}: no block of its tiny twin holds the same parameters. "
                "Dissect the model with its weights loaded: then it is examined itself."
            )
        shapes = tuple(sorted((n[len(block) :], s) for n, s in own.items()))
        failure: AnatomyError | None = None
        for source in sorted(candidates, key=lambda b: -len(self.by_block[b])):
            key = source, shapes
            try:
                if key not in self.cache:
                    self.cache[key] = block, self._block(source, block)
            except AnatomyError as error:  # kinds of layers with the same parameters in other sizes
                failure = failure or error
                continue
            old, drafts = self.cache[key]
            return source, drafts if old == block else _numbered([d.renamed(old, block) for d in drafts], block)
        assert failure is not None
        raise failure

    def _is_at(self, source: str, block: str) -> bool:
        """Whether a block of the twin is where the like of a real one must be, by its place in each list of modules."""
        ours, theirs = block.split("."), source.split(".")
        for i, (real, tiny) in enumerate(zip(ours, theirs, strict=True)):
            if real.isdigit():
                count, small = self.lengths[1][".".join(ours[:i])], self.lengths[0][".".join(theirs[:i])]
                like = range(count) if count == small else self.like.get((count, small))
                if like is not None and int(tiny) != like[int(real)]:
                    return False
        return True

    def _block(self, source: str, block: str) -> list[Draft]:
        """Drafts of one real block after its source in the twin."""
        drafts = self.by_block[source]
        numbers = {d.expert for d in drafts if d.expert is not None}
        if len(numbers) == 1 and _number_of(block) is not None:
            drafts = _numbered(drafts, block)
            numbers = set()
        inside = {name: other for other, name in self.shared[0].items() if is_under(other, source)}
        moved = [d.each(lambda n: inside.get(n, n)).renamed(source, block) for d in drafts]
        small = {block + n[len(source) :] if source else n: s for n, s in self.small.items() if is_under(n, source)}
        lists = [path for path in self.lengths[1] if is_under(path, block) and canonical_of(path) in self.inner]
        moved, small = lengthened(moved, small, self.large, lists)
        plan = Plan(moved, small, self.large, self._counts(source, block, drafts), bool(numbers))
        return [d.each(lambda n: self.shared[1].get(n, n)) for d in plan.drafts()]

    def _counts(self, source: str, block: str, drafts: list[Draft]) -> dict[int, int]:
        """Unit counts of head-like groups in the twin -> in the real model, from the nearest configs."""
        small, large = config_of(self.twin, source), config_of(self.model, block)
        counts: dict[int, int] = {}
        if small is None or large is None:
            return counts
        real = head_counts(large)
        by_size: dict[int, set[int]] = defaultdict(set)
        for name, value in head_counts(small).items():
            by_size[value].add(real.get(name, value))
        ratios = {Fraction(real[n], v) for n, v in head_counts(small).items() if real.get(n, 0) > 1}
        factor = ratios.pop() if len(ratios) == 1 else Fraction(0)
        for draft in drafts:
            if draft.kind in ("head", "kv_group"):
                known = by_size.get(draft.count, set())
                scaled = draft.count * factor if draft.count > 1 else Fraction(1)
                count = min(known) if len(known) == 1 else int(scaled) if scaled.denominator == 1 else 0
                counts[draft.count] = count
        return counts


def _number_of(block: str) -> int | None:
    """The number of an expert that is an element of a list, or of a dict by a name like ``expert_3``."""
    found = re.search(r"\.\d+\..*[._](\d+)$", block)
    return int(found[1]) if found else None


def _numbered(drafts: list[Draft], block: str) -> list[Draft]:
    """The neurons of one expert with its number; those of experts that share tensors stay."""
    number, own = _number_of(block), {d.expert for d in drafts if d.expert is not None}
    if number is None or len(own) != 1:
        return drafts
    return [replace(d, expert=number) if d.expert is not None else d for d in drafts]


def agree(carried: list[Draft], found: list[Draft]) -> bool:
    """Whether drafts carried over to a model are those found in it."""
    ours, theirs = ({(d.kind, _sort_key(d)): d for d in drafts} for drafts in (carried, found))
    return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)


def _sort_key(draft: Draft) -> tuple:
    return tuple(sorted(str(s.name) for s in draft.slots)), draft.expert


def _same(a: Draft, b: Draft) -> bool:
    one, other = ({str(s.name): s.index for s in d.slots} for d in (a, b))
    if (a.count, a.closed, a.classes, a.parent_units) != (b.count, b.closed, b.classes, b.parent_units):
        return False
    return all(
        one[n].keys() == other[n].keys() and all(np.array_equal(one[n][d], other[n][d]) for d in one[n]) for n in one
    )
