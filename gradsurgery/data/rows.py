"""Labelled rows: packed sequences with their category and their two label columns; a data set for any torch loader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradsurgery.errors import DataError

Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Rows(Dataset[Batch]):
    """``input_ids`` [rows, context], ``category`` [rows] (into ``categories``), bool ``forget``, ``retain``."""

    input_ids: Tensor
    category: Tensor
    forget: Tensor
    retain: Tensor
    categories: tuple[str, ...]

    @staticmethod
    def uniform(input_ids: Tensor, category: str, forget: bool, retain: bool, categories: tuple[str, ...]) -> Rows:
        """Rows of one category that all carry the same labels."""
        n = len(input_ids)
        index = torch.full((n,), categories.index(category))
        return Rows(input_ids, index, torch.full((n,), forget), torch.full((n,), retain), categories)

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, in order; the parts share their categories and context length."""
        names = ("input_ids", "category", "forget", "retain")
        ids, category, forget, retain = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return Rows(ids, category, forget, retain, parts[0].categories)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return int(self.input_ids.shape[1])

    def __getitem__(self, index: int) -> Batch:
        return {
            "input_ids": self.input_ids[index].long(),
            "labels": self.input_ids[index].long(),
            "category": self.category[index],
            "forget": self.forget[index],
            "retain": self.retain[index],
        }

    def of(self, category: str) -> Tensor:
        """Indices of the rows of one category."""
        if category not in self.categories:
            raise DataError(f"there is no category {category!r}; there are {', '.join(self.categories)}.")
        return (self.category == self.categories.index(category)).nonzero()[:, 0]

    def summary(self) -> list[dict[str, Any]]:
        """One line for each category: rows, and how many carry which label; for a table in a report."""
        lines: list[dict[str, Any]] = []
        for name in self.categories:
            mine = self.of(name)
            forget, retain = int(self.forget[mine].sum()), int(self.retain[mine].sum())
            lines.append(
                {
                    "category": name,
                    "rows": len(mine),
                    "forget": forget,
                    "retain": retain,
                    "unlabelled": len(mine) - forget - retain,
                }
            )
        return lines
