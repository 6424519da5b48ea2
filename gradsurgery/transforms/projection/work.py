"""One projection: measure, solve on the host, subtract; again where rounding left something."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurgery.transforms.projection.blocks import Blocks, ByRow, Numbered, energy
from gradsurgery.transforms.projection.layout import Layout, Part
from gradsurgery.transforms.projection.measure import ranks_across
from gradsurgery.transforms.projection.nudge import nudge_parts, nudge_rows
from gradsurgery.transforms.projection.solve import coefficients
from gradsurgery.transforms.projection.targets import Moved, Target

if TYPE_CHECKING:
    from gradsurgery.transforms.projection.options import Projection

ROUNDS, UPDATE_ROUNDS = 3, 6
MOSTLY = 15 / 16
"""Share of the squared norm from which on what is left is small enough to feel the rounding of what was removed."""
NOTHING = 2.0**-24
"""Cosines that are rounding of sums in fp32."""
UPDATE_NOTHING = 1e-7


class Work:
    """A projection at work on one target.

    Args:
        options: What to remove.
        layout: The blocks.
        target: What is projected.
        vectors: What it is projected away from, tensors by parameter name.
        parameters: Say how tensors are dealt out over ranks.

    Attributes:
        before: Gram matrices of the parts, numbered ones first, then those by row: ``[parts, vectors, vectors]``.
        removed: Squared norms of what was removed from the parts.
        vanished: Blocks whose vectors were zero, or below the floor.
    """

    def __init__(
        self,
        options: Projection,
        layout: Layout,
        target: Target,
        vectors: Sequence[Mapping[str, Tensor]],
        parameters: Mapping[str, Tensor],
    ) -> None:
        self.options, self.target, self.vectors, self.parameters = options, target, vectors, parameters
        self.moved = target if isinstance(target, Moved) else None
        self.count = 1 + len(vectors)
        self.sign = 1 if self.moved is None else -1
        wide = {t.dtype for t in target.tensors.values()} == {torch.float64}
        self.nothing = 1e-15 if wide else NOTHING if self.moved is None else UPDATE_NOTHING
        me = weakref.proxy(self)  # a cycle would keep gradient and vectors until garbage is collected
        self.blocks = [Numbered(me, layout.parts, layout.blocks), ByRow(me, layout.rows)]

    def run(self, parked: Target | None = None) -> None:
        """Project; what is removed is added to ``parked``."""
        for blocks in self.blocks:
            if blocks.parts:
                self._run(blocks, parked)
        self.before = torch.cat([b.before for b in self.blocks])
        self.removed = torch.cat([b.removed() for b in self.blocks])
        self.vanished = sum(b.vanished for b in self.blocks)

    def _run(self, blocks: Blocks, parked: Target | None) -> None:
        options, parts = self.options, list(blocks.parts)
        still = torch.zeros(0, dtype=torch.bool)
        again = options.keep_weight == options.removed_weight == options.max_cosine == 1.0
        for round_ in range((ROUNDS if self.moved is None else UPDATE_ROUNDS) if again else 1):
            gram = blocks.measure(parts)
            open_ = torch.ones(len(gram), dtype=torch.bool) if not round_ else still
            # what rounding leaves of one vector goes in either direction; of several, only what still is not allowed
            chosen = options if not round_ or self.count > 2 else dataclasses.replace(options, remove="both")
            factors = coefficients(gram, chosen, self.sign, self.nothing) * options.removed_weight * open_[:, None]
            if not round_:
                blocks.begin(gram, factors)
            elif not factors.any():
                break
            keep = options.keep_weight if not round_ else 1.0
            if round_ > 1 and self.moved is not None and self.count == 2:
                self._nudge(self.moved, blocks, parts, gram * open_[:, None, None])
            else:
                for part in parts:
                    self._subtract(blocks, part, factors, keep, parked)
            removed = energy(gram, factors)
            still = removed > MOSTLY * gram[:, 0, 0] if self.moved is None else removed > 0
            still = still & open_
            parts = [part for part in parts if blocks.of(part, still).any()]
            if not parts:
                break

    def _subtract(self, blocks: Blocks, part: Part, factors: Tensor, keep: float, parked: Target | None) -> None:
        mine: Any = blocks.of(part, factors)
        vectors = [v.get(part.name) for v in self.vectors]
        some = bool(mine.any())
        if isinstance(blocks, Numbered):
            mine = mine.tolist()
        if some or keep != 1.0:
            self.target.subtract_(part, vectors, mine, keep)
        if some and parked is not None:
            parked.subtract_(part, vectors, [-f for f in mine] if isinstance(mine, list) else -mine, 1.0)

    def _nudge(self, moved: Moved, blocks: Blocks, parts: Sequence[Part], gram: Tensor) -> None:
        """What is left of one vector is smaller than the gaps between weights."""
        norms = (gram[:, 0, 0] * gram[:, 1, 1]).sqrt()
        excess = torch.where(gram[:, 0, 1].abs() > self.nothing * norms, gram[:, 0, 1], 0.0)
        if isinstance(blocks, Numbered):
            nudge_parts(moved, parts, self.vectors[0], excess, self.parameters)
            return
        for part in parts:
            ranks = ranks_across(self.parameters[part.name])
            nudge_rows(moved, part, self.vectors[0].get(part.name), blocks.of(part, excess), ranks)
