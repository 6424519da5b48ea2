"""The swap test: nothing that coupling proposes is believed before the randomised replica agrees.

Units of one exchange class can be permuted without changing the output; a consumer alone cannot. Units whose zeroed
consumers hide everything else about them are closed. Many groups are tried in one forward; only where that fails are
they tried one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gradsurgery.errors import AnatomyError

from .draft import Draft, Slot
from .moves import fill_, permute_, restored, unit_values
from .node import cotangent

Forward = Callable[[], list[Tensor]]


class Judge:
    """Swap and ablation tests on one replica.

    Args:
        forward: Outputs of the replica for fixed inputs.
        tensors: Its learned parameters and buffers.
        tolerance: Relative output change below which two outputs are the same.
    """

    def __init__(self, forward: Forward, tensors: dict[str, Tensor], tolerance: float = 1e-9) -> None:
        self.forward, self.tensors, self.tolerance = forward, tensors, tolerance
        with torch.no_grad():
            self.base = forward()
            if not self.difference(forward()) < tolerance:
                raise AnatomyError(
                    "two forwards of the model on the same inputs differ: it is random in eval mode too (dropout that "
                    "does not ask for the mode, sampled noise), so that no test can tell a unit. Switch it off first."
                )
        self.known: set[tuple[int, ...]] = set()
        self.generator = torch.Generator().manual_seed(3)

    def difference(self, outputs: list[Tensor], base: list[Tensor] | None = None) -> float:
        """Largest relative change of any output; not-a-number counts as infinite."""
        worst = 0.0
        for new, old in zip(outputs, base or self.base, strict=True):
            if new.shape != old.shape:
                return float("inf")
            change = float((new - old).abs().max() / old.abs().mean().clamp_min(1e-30))
            worst = max(worst, change if change == change else float("inf"))
        return worst

    @torch.no_grad()
    def same_after(self, moves: Sequence[tuple[Draft, Tensor]]) -> bool:
        """Whether permuting these groups' units leaves the output alone."""
        with restored(self.tensors, [s for d, _ in moves for s in d.slots]):
            for draft, order in moves:
                permute_(self.tensors, draft.slots, order)
            return self.difference(self.forward()) < self.tolerance

    def exchange(self, drafts: Sequence[Draft], depth: int = 0) -> list[bool]:
        """Which groups survive a random permutation inside their classes: all at once, then by halves."""
        moves = [(d, self.shuffle(d)) for d in drafts]
        moving = [m for m in moves if not torch.equal(m[1], torch.arange(len(m[1])))]
        if not moving or self.same_after(moving):
            return [True] * len(drafts)
        if len(drafts) == 1:
            return [False]
        half = len(drafts) // 2
        return self.exchange(drafts[:half]) + self.exchange(drafts[half:])

    def shuffle(self, draft: Draft) -> Tensor:
        """A permutation without fixed points inside every class of more than one unit."""
        classes = torch.tensor(draft.classes if draft.classes is not None else [0] * draft.count)
        order = torch.arange(draft.count)
        for label in classes.unique():
            members = torch.nonzero(classes == label).flatten()
            mixed = members[torch.randperm(len(members), generator=self.generator)]
            order[mixed] = mixed.roll(1)
        return order

    def swaps(self, draft: Draft, one: int, other: int) -> bool:
        order = torch.arange(draft.count)
        order[one], order[other] = other, one
        return self.same_after([(draft, order)])

    def classes(self, draft: Draft, limit: int = 40) -> tuple[int, ...]:
        """Exchange classes: those another layer has, equal blocks or strides, every unit alone, or by pair swaps.

        Beyond ``limit`` units of no such form every unit is taken to be alone.
        """
        count = draft.count
        sizes = [size for size in range(2, count) if count % size == 0]
        blocks = [tuple(i // size for i in range(count)) for size in sizes]
        blocks += [tuple(i % size for i in range(count)) for size in sizes]
        if count <= limit:
            blocks.append(tuple(range(count)))
        known = [classes for classes in self.known if len(classes) == count]
        found = next((c for c in [*known, *blocks] if self._fits(replace(draft, classes=c))), None)
        if found is None:
            found = self._by_pairs(draft) if count <= limit else tuple(range(count))
        self.known.add(found)
        return found

    def _by_pairs(self, draft: Draft) -> tuple[int, ...]:
        labels = [-1] * draft.count
        for unit in range(draft.count):
            if labels[unit] < 0:
                labels[unit] = unit
                for other in range(unit + 1, draft.count):
                    if labels[other] < 0 and self.swaps(draft, unit, other):
                        labels[other] = unit
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return tuple(order[label] for label in labels)

    def _fits(self, draft: Draft) -> bool:
        """Whether classes seen in another layer hold here: permuting inside changes nothing, swapping across does."""
        classes = draft.classes or ()
        firsts = [classes.index(label) for label in dict.fromkeys(classes)]
        return self.exchange([draft])[0] and not any(self.swaps(draft, a, b) for a, b in pairwise(firsts))

    @torch.no_grad()
    def closed(self, drafts: Sequence[Draft]) -> list[bool]:
        """For which groups zeroed consumers hide the producers: all at once, then by halves."""
        if not drafts:
            return []
        slots = [s for d in drafts for s in d.slots]
        with restored(self.tensors, slots):
            units = [torch.arange(0, d.count, 2) for d in drafts]
            for draft, some in zip(drafts, units, strict=True):
                fill_(self.tensors, consumers(draft), some, None)
            ablated = self.forward()
            for draft, some in zip(drafts, units, strict=True):
                fill_(self.tensors, producers(draft), some, self.generator)
            same = self.difference(self.forward(), ablated) < self.tolerance
        if same or len(drafts) == 1:
            return [same] * len(drafts)
        half = len(drafts) // 2
        return self.closed(drafts[:half]) + self.closed(drafts[half:])

    @cached_property
    def slopes(self) -> dict[str, Tensor]:
        """Gradient of a random direction of the outputs with respect to every tensor."""
        with torch.enable_grad():
            outputs = [x for x in self.forward() if x.requires_grad]
            listed = list(self.tensors.items())
            found = torch.autograd.grad(
                outputs, [t for _, t in listed], [cotangent(x) for x in outputs], allow_unused=True
            )
        return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(listed, found, strict=True)}

    def heard(self, draft: Draft) -> bool:
        """Whether the output listens to the consumers of the units, to first order."""
        values = unit_values(self.slopes, consumers(draft), draft.count)
        return int((values > 0).sum()) * 8 > draft.count  # on few tokens many neurons clip

    def silent(self) -> set[str]:
        """Tensors that the output does not listen to, to first order: dead ones, and those that only make choices."""
        return {name for name, slope in self.slopes.items() if not bool(slope.any())}


def consumers(draft: Draft) -> list[Slot]:
    return [slot for slot in draft.slots if slot.role == "consumer"]


def producers(draft: Draft) -> list[Slot]:
    return [slot for slot in draft.slots if slot.role != "consumer"]


def disjoint(draft: Draft) -> bool:
    """Whether no two units of a group claim one entry; rows and columns of one tensor always cross."""
    names = [slot.name for slot in draft.slots]
    if len(set(names)) < len(names):
        return False
    for slot in draft.slots:
        if not isinstance(slot.name, str) or draft.count == 1:
            continue
        if not any(len(np.unique(rows)) == rows.size for rows in slot.index.values()):
            cells = {dim: rows.shape[1] for dim, rows in slot.index.items()}
            grids = np.zeros((draft.count, int(np.prod(list(cells.values()))), len(cells)), dtype=np.int64)
            for unit in range(draft.count):
                mesh = np.meshgrid(*(rows[unit] for rows in slot.index.values()), indexing="ij")
                grids[unit] = np.stack([m.ravel() for m in mesh], axis=1)
            flat = grids.reshape(-1, len(cells))
            if len(cells) == 0 or len(np.unique(flat, axis=0)) != len(flat):
                return False
    return True


def with_classes(draft: Draft, classes: tuple[int, ...]) -> Draft:
    return replace(draft, classes=classes)
