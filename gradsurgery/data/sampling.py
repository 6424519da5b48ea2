"""Which rows make a batch: a given number of each category, seeded, endless, resumable at any step.

Batch ``k`` is a pure function of the seed and ``k``: nothing is remembered but the step, and a run that resumes sees
exactly the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b

import torch
from torch import Tensor
from torch.utils.data import Sampler

from gradsurgery.data.rows import Rows
from gradsurgery.errors import DataError


class MixedSampler(Sampler[list[int]]):
    """Yields index lists (a ``batch_sampler`` for a ``DataLoader``); every category cycles through epochs of its own.

    Args:
        rows: What to draw from.
        per_batch: Rows of each category in a batch; or the size of a batch, whose mix then follows the data: every
            epoch goes through each category as often as ``upsample`` says, in one shuffled order.
        upsample: Category -> factor, where ``per_batch`` is a size. 2.0 is twice an epoch, 0.5 half, 0 not at all.
        seed: Of all orders.
        steps: Batches to yield in total, resumed ones counted; ``None`` is endless.
    """

    def __init__(
        self,
        rows: Rows,
        per_batch: Mapping[str, int] | int,
        upsample: Mapping[str, float] | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        self.seed, self.steps, self.step = seed, steps, 0
        self._members = {name: rows.of(name) for name in rows.categories}
        self.per_batch = per_batch if isinstance(per_batch, int) else dict(per_batch)
        factors = dict(upsample or {})
        if upsample and not isinstance(per_batch, int):
            raise DataError("upsample needs per_batch as a size: rows given for each category already fix the mix.")
        chosen = {**factors, **(self.per_batch if isinstance(self.per_batch, dict) else {})}
        for name, number in chosen.items():
            if not 0 <= number < float("inf"):
                raise DataError(f"{name!r}: {number} is no number of rows and no factor: give 0 or more.")
            if not len(rows.of(name)) and number:
                raise DataError(f"category {name!r} has no row to draw.")
        if (per_batch if isinstance(per_batch, int) else sum(per_batch.values())) < 1:
            raise DataError(f"per_batch={per_batch} makes empty batches.")
        self._copies = {name: round(factors.get(name, 1.0) * len(of)) for name, of in self._members.items()}
        if not sum(self._copies.values()):
            raise DataError(f"upsample={upsample} leaves no row to draw.")
        self._cache: dict[tuple[str, int], Tensor] = {}

    def indices(self, step: int) -> list[int]:
        """The rows of batch ``step``."""
        if isinstance(self.per_batch, int):
            return self._cycle("", step * self.per_batch, self.per_batch)
        parts = (self._cycle(name, step * n, n) for name, n in self.per_batch.items())
        return [index for part in parts for index in part]

    def epochs(self) -> dict[str, float]:
        """How often each category has been gone through so far."""
        if isinstance(self.per_batch, int):
            done = self.step * self.per_batch / sum(self._copies.values())
            return {n: done * self._copies[n] / len(of) if len(of) else 0.0 for n, of in self._members.items()}
        return {name: self.step * n / max(1, len(self._members[name])) for name, n in self.per_batch.items()}

    def state_dict(self) -> dict[str, object]:
        """The position: the number of the next batch, with what it depends on."""
        return {"step": self.step, "seed": self.seed, "rows": {n: len(of) for n, of in self._members.items()}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where ``state`` was taken; refused where the same batches would not follow."""
        mine = self.state_dict()
        for name in ("seed", "rows"):
            if state.get(name) != mine[name]:
                raise DataError(f"the saved batches had {name} {state.get(name)}, these have {mine[name]}.")
        self.step = int(str(state["step"]))

    def __iter__(self) -> Iterator[list[int]]:
        while self.steps is None or self.step < self.steps:
            self.step += 1
            yield self.indices(self.step - 1)

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("these batches are endless: give steps to bound them")
        return self.steps

    def _cycle(self, name: str, start: int, count: int) -> list[int]:
        """``count`` entries from position ``start`` of the endless row of shuffled epochs."""
        found: list[int] = []
        while len(found) < count:
            size = len(self._members[name]) if name else sum(self._copies.values())
            epoch, position = divmod(start + len(found), size)
            found += self._order(name, epoch)[position : position + count - len(found)].tolist()
        return found

    def _order(self, name: str, epoch: int) -> Tensor:
        if (name, epoch) not in self._cache:
            self._cache = {key: order for key, order in self._cache.items() if key[0] != name}
            self._cache[name, epoch] = self._shuffle(name, epoch)
        return self._cache[name, epoch]

    def _shuffle(self, name: str, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(_seed(self.seed, name, epoch))
        if name:
            members = self._members[name]
            return members[torch.randperm(len(members), generator=generator)]
        parts = []
        for category, copies in self._copies.items():
            members, left = self._members[category], copies
            while left > 0:
                parts.append(members[torch.randperm(len(members), generator=generator)[:left]])
                left -= len(members)
        mix = torch.cat(parts)
        return mix[torch.randperm(len(mix), generator=generator)]


def _seed(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=7).digest(), "big")
