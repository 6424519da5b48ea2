"""One pass under way: the label columns of its batch, and which rows of a module's input they flag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import BatchError
from gradsurgery.transforms.base import Where
from gradsurgery.transforms.engine.flags import Shape, check_column, check_size, expand_flags, uniform
from gradsurgery.transforms.engine.program import Program
from gradsurgery.transforms.engine.rows import RowClasses

__all__ = ["Run", "check_column"]

_CROSS_ATTENTION = ("encdecattention", "encoder_attn", "encoder_attention", "crossattention", "cross_attn")


class Run:
    """What hooks need to know about the pass that is running.

    Args:
        columns: The label columns by name.
        passes: How many passes this step runs.
        shape: ``(batch, tokens)`` of the pass, where it is known: it tells flattened rows from others.
    """

    def __init__(
        self, columns: Mapping[str, Tensor] | None = None, passes: int = 1, shape: tuple[int, int] | None = None
    ) -> None:
        self.columns = {name: check_column(name, flags) for name, flags in (columns or {}).items()}
        self.passes = passes
        self.shape: Shape = shape
        self.tokens_first: frozenset[str] = frozenset()
        self._classes: dict[tuple[Any, ...], tuple[list[Tensor], RowClasses]] = {}

    def flags(self, where: Where, path: str, lead: tuple[int, ...] | None = None) -> Tensor:
        """The flags that a ``where`` means for the module at ``path``, whose input leads with ``lead``."""
        if isinstance(where, Mapping):
            return self._of_part(where, path, lead)
        if isinstance(where, str):
            if where not in self.columns:
                have = ", ".join(self.columns) or "none"
                raise BatchError(
                    f"the batch has no label column {where!r} (it has: {have}). Add it as a bool tensor [batch]."
                )
            return check_size(self.columns[where], self.shape)
        return check_size(check_column("where", where), self.shape)

    def _of_part(self, where: Mapping[str, str | Tensor], path: str, lead: tuple[int, ...] | None) -> Tensor:
        parts = path.split(".")
        key = next((key for key in where if key in parts), "decoder" if "decoder" in where else None)
        if key is None:  # the head of an encoder-decoder reads decoder rows, whatever its path
            raise BatchError(f"where has no entry for {path}: it names {', '.join(where)}, none a part of that path.")
        own = self.flags(where[key], path)
        crosses = any(name in part.lower() for part in parts for name in _CROSS_ATTENTION)
        if not crosses or "encoder" not in where or key == "encoder" or lead is None:
            return own
        other = self.flags(where["encoder"], path)
        if own.dim() == other.dim() == 1 or (own.shape == other.shape and bool((own == other).all())):
            return own
        fits = [flags for flags in (own, other) if _fits(flags, lead)]  # queries read decoder rows, keys encoder rows
        if len(fits) != 1:
            raise BatchError(
                f"{path} reads decoder or encoder rows, and flags {list(own.shape)} and {list(other.shape)} do not "
                f"tell which for leading dimensions {list(lead)}. Use [batch] flags, or other sequence lengths."
            )
        return fits[0]

    def all_flags(self, program: Program, lead: tuple[int, ...] | None = None) -> list[Tensor]:
        """The flags of all label columns of a program."""
        found = [self.flags(where, program.path, lead) for where in program.wheres]
        if program.path in self.tokens_first and not all(uniform(flags) for flags in found):
            raise BatchError(
                f"{program.path} runs on [token, batch, …] (batch_first=False), where flags do not fit. Build it with "
                f"batch_first=True, leave it out of the region, or flag the whole batch alike."
            )
        return found

    def stacked(self, program: Program, lead: tuple[int, ...], device: torch.device, checked: bool = True) -> Tensor:
        """``[columns, rows]`` flags of a module's input."""
        given = self.all_flags(program, lead)
        flags = [expand_flags(f, lead, program.path, self.shape, checked).reshape(-1) for f in given]
        if not flags:
            count = 1
            for n in lead:
                count *= n
            return torch.zeros(0, count, dtype=torch.bool, device=device)
        return torch.stack([f.to(device) for f in flags])

    def classes(self, program: Program, lead: tuple[int, ...], device: torch.device) -> RowClasses:
        """Row classes of a module's input; computed once for all modules with the same flags and shape."""
        given = self.all_flags(program, lead)
        key = (tuple((id(flags), _version(flags)) for flags in given), lead, device)
        if key not in self._classes:
            if program.per_row:
                classes = RowClasses.of(self.stacked(program, lead, torch.device("cpu")), device)
            else:
                count = 1
                for n in lead:
                    count *= n
                classes = RowClasses.plain(count, device)
            self._classes[key] = given, classes  # holding the flags, whose ids would be used again otherwise
        return self._classes[key][1]


def _fits(flags: Tensor, lead: tuple[int, ...]) -> bool:
    if flags.dim() == 1:
        return lead[:1] == flags.shape
    return flags.shape[1] in lead[1:] if len(lead) > 1 else lead[0] == flags.numel()


def _version(flags: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or flags.is_inference() else flags._version
