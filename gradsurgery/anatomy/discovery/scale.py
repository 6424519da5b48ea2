"""Groups found in a tiny twin, carried over to the real model and checked against its shapes.

Blocks are matched by what they hold, head counts come from the configs, run lengths from the real shapes; whatever is
not unambiguous raises.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
from torch import nn

from gradsurgery.errors import AnatomyError

from .draft import Draft
from .names import config_of, enclosing_of, is_under, natural_of, shapes_of, signature_of
from .partition import Inner, block_of
from .plan import Plan
from .shrink import head_counts


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
        self.drafts = drafts
        self.by_block: dict[str, list[Draft]] = defaultdict(list)
        blocks, self.blocks = set(block_of(twin, inner).values()), block_of(model, inner)
        for draft in drafts:
            self.by_block[enclosing_of(draft.block, blocks)].append(draft)
        self.signatures: dict[tuple, list[str]] = defaultdict(list)
        for block in sorted(blocks, key=natural_of):
            self.signatures[signature_of(block, self.small)].append(block)
        self.cache: dict[tuple, list[Draft]] = {}
        self.sources: dict[str, str] = {}

    def carried(self) -> list[Draft]:
        """Drafts of the real model.

        Raises:
            AnatomyError: A block has no counterpart in the twin, or its shapes do not fit.
        """
        found: list[Draft] = []
        for block in sorted(set(self.blocks.values()), key=natural_of):
            candidates = self.signatures.get(signature_of(block, self.large))
            if not candidates:
                raise AnatomyError(
                    f"{block or type(self.model).__name__}: no block of its tiny twin holds the same parameters. "
                    "Dissect the model with its weights loaded: then it is examined itself."
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
        small = {block + n[len(source) :] if source else n: s for n, s in self.small.items() if is_under(n, source)}
        plan = Plan(moved, small, self.large, self._counts(source, drafts), bool(numbers))
        return plan.drafts()

    def _counts(self, source: str, drafts: list[Draft]) -> dict[int, int]:
        """Unit counts of head-like groups in the twin -> in the real model, from the nearest configs."""
        small, large = config_of(self.twin, source), config_of(self.model, source)
        counts: dict[int, int] = {}
        if small is None or large is None:
            return counts
        real = head_counts(large)
        by_size: dict[int, set[int]] = defaultdict(set)
        for name, value in head_counts(small).items():
            by_size[value].add(real.get(name, value))
        ratios = {real[n] / v for n, v in head_counts(small).items() if real.get(n, 0) > 1}
        factor = int(ratios.pop()) if len(ratios) == 1 else 0
        for draft in drafts:
            if draft.kind in ("head", "kv_group"):
                known = by_size.get(draft.count, set())
                scaled = draft.count * (factor if draft.count > 1 else 1)
                counts[draft.count] = min(known) if len(known) == 1 else scaled
        return counts


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
