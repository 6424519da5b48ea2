"""Rows of conversations: of unequal length, with labels of their own, for any torch loader."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gradsurgery.data.batches import collate
from gradsurgery.data.chat import IGNORED, Encoded
from gradsurgery.data.rows import Batch, Rows
from gradsurgery.errors import DataError


@dataclass(frozen=True, eq=False)
class ChatRows(Rows):
    """Rows of unequal length with labels of their own, and a bool column ``opposed``.

    Attributes:
        labels: ``[rows, context]``, ``-100`` where nothing is to be learned.
        lengths: Tokens of each row, ``[rows]``; batches are padded no further than their longest row.
        opposed: ``[rows]``.
    """

    labels: Tensor
    lengths: Tensor
    opposed: Tensor

    @staticmethod
    def build(encoded: Mapping[str, Sequence[Encoded]], opposed: Collection[str] = ()) -> ChatRows:
        """Rows by category.

        Raises:
            DataError: no rows, rows without a label, or an opposed category that is not there.
        """
        if unknown := set(opposed) - set(encoded):
            raise DataError(f"no rows of {', '.join(sorted(unknown))}; there are {', '.join(encoded)}.")
        rows = [row for category in encoded.values() for row in category]
        if not rows:
            raise DataError(f"there are no rows of {', '.join(encoded) or 'anything'}.")
        for category, part in encoded.items():
            if part and all(label < 0 for _, labels in part for label in labels[1:]):
                raise DataError(f"the rows of {category} have no label: nothing could be learned from them.")
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        shape = (len(rows), int(lengths.max()))
        tokens, labels = torch.zeros(shape, dtype=torch.int32), torch.full(shape, IGNORED, dtype=torch.int32)
        for k, (ids, wanted) in enumerate(rows):
            tokens[k, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            labels[k, : len(ids)] = torch.tensor(wanted, dtype=torch.int32)
        owners = torch.cat([torch.full((len(part),), k) for k, part in enumerate(encoded.values())])
        flagged = torch.cat([torch.full((len(part),), name in opposed) for name, part in encoded.items()])
        none = torch.zeros(len(rows), dtype=torch.bool)
        return ChatRows(tokens, owners, none, none, tuple(encoded), labels, lengths, flagged)

    @property
    def context(self) -> int:
        """Tokens of a row, the mean."""
        return round(float(self.lengths.float().mean()))

    def sample(self, count: int) -> ChatRows:
        """At most ``count`` rows of each category, spread evenly over it."""
        chosen = []
        for name in self.categories:
            mine = self.of(name)
            chosen.append(mine[torch.linspace(0, len(mine) - 1, min(count, len(mine))).round().long()])
        keep = torch.cat(chosen)
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        parts.update({name: part[keep] for name, part in parts.items() if isinstance(part, Tensor)})
        return ChatRows(**parts)

    def batches(self, category: str, size: int) -> Iterator[Batch]:
        """The rows of one category, padded on the right; those of about the same length go together."""
        mine = self.of(category)
        for chosen in mine[self.lengths[mine].argsort(stable=True)].split(size):
            yield collate([self[int(k)] for k in chosen])

    def __getitem__(self, index: int) -> Batch:
        length = int(self.lengths[index])
        return {
            "input_ids": self.input_ids[index, :length].long(),
            "labels": self.labels[index, :length].long(),
            "category": self.category[index],
            "opposed": self.opposed[index],
        }
