"""One pass under way: the label columns of its batch, and which rows of a module's input they flag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import BatchError
from gradsurgery.transforms.base import Where
from gradsurgery.transforms.engine.program import Program
from gradsurgery.transforms.engine.rows import RowClasses


def check_column(name: str, flags: Any) -> Tensor:
    """A label column as it must be: a bool tensor ``[batch]`` or ``[batch, token]``."""
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.dim() not in (1, 2):
        given = f"{flags.dtype} {list(flags.shape)}" if isinstance(flags, Tensor) else type(flags).__name__
        raise BatchError(f"label column {name!r} must be a bool tensor [batch] or [batch, token], not {given}.")
    return flags


def expand_flags(flags: Tensor, lead: tuple[int, ...], path: str) -> Tensor:
    """``[batch]`` or ``[batch, token]`` flags for an input whose leading dimensions are ``lead``.

    Flattened inputs (``[batch * token, features]``) are recognised; a leading dimension of one means that the module is
    fed without a batch, and the flags keep their own (the caller expands the input).
    """
    batch, count = flags.shape[0], 1
    for n in lead:
        count *= n
    if flags.dim() == 1:
        if lead and lead[0] == batch:
            return flags.reshape(batch, *[1] * (len(lead) - 1)).expand(lead)
        if len(lead) == 1 and count % batch == 0:
            return flags.repeat_interleave(count // batch)
    else:
        tokens = [
            d for d in range(1, len(lead)) if lead[d] == flags.shape[1]
        ]  # [batch, token, …] or [batch, head, token]
        if lead and lead[0] == batch and (len(tokens) == 1 or (tokens and flags.shape[1] == 1)):
            return flags.reshape(batch, *[flags.shape[1] if d == tokens[0] else 1 for d in range(1, len(lead))]).expand(
                lead
            )
        if len(lead) == 1 and count == flags.numel():
            return flags.reshape(-1)
    if bool(flags.all()) or not bool(flags.any()):  # every row is treated alike, whatever its example
        return flags.reshape(-1)[:1].reshape([1] * len(lead)).expand(lead)
    raise BatchError(
        f"flags {list(flags.shape)} do not fit the input of {path}, whose leading dimensions are {list(lead)}: its "
        f"rows cannot be told apart by example. Leave this module out of the region, or pass flags of its own shape."
    )


class Run:
    """What hooks need to know about the pass that is running.

    Args:
        columns: The label columns by name.
        passes: How many passes this step runs.
    """

    def __init__(self, columns: Mapping[str, Tensor] | None = None, passes: int = 1) -> None:
        self.columns = {name: check_column(name, flags) for name, flags in (columns or {}).items()}
        self.passes = passes
        self._classes: dict[tuple[Any, ...], RowClasses] = {}

    def flags(self, where: Where, path: str) -> Tensor:
        """The flags that a ``where`` means for the module at ``path``."""
        if isinstance(where, Mapping):
            parts = path.split(".")
            found = [value for key, value in where.items() if key in parts]
            if not found:
                raise BatchError(
                    f"where has no entry for {path}: it names {', '.join(where)}, none a part of that path."
                )
            where = found[0]
        if isinstance(where, str):
            if where not in self.columns:
                have = ", ".join(self.columns) or "none"
                raise BatchError(
                    f"the batch has no label column {where!r} (it has: {have}). Add it as a bool tensor [batch]."
                )
            return self.columns[where]
        assert isinstance(where, Tensor)
        return check_column("where", where)

    def batch_size(self, program: Program) -> int:
        """The number of examples that a program's flags speak of."""
        return self.flags(program.wheres[0], program.path).shape[0]

    def stacked(self, program: Program, lead: tuple[int, ...], device: torch.device) -> Tensor:
        """``[columns, rows]`` flags of a module's input."""
        flags = [expand_flags(self.flags(w, program.path), lead, program.path).reshape(-1) for w in program.wheres]
        if not flags:
            count = 1
            for n in lead:
                count *= n
            return torch.zeros(0, count, dtype=torch.bool, device=device)
        return torch.stack([f.to(device) for f in flags])

    def classes(self, program: Program, lead: tuple[int, ...], device: torch.device) -> RowClasses:
        """Row classes of a module's input; computed once for all modules with the same columns and shape."""
        names = tuple(where if isinstance(where, str) else id(where) for where in program.wheres)
        mapped = any(isinstance(where, Mapping) for where in program.wheres)
        key = (names, program.path if mapped else "", lead, device)
        if key not in self._classes:
            if program.per_row:
                self._classes[key] = RowClasses.of(self.stacked(program, lead, torch.device("cpu")), device)
            else:
                count = 1
                for n in lead:
                    count *= n
                self._classes[key] = RowClasses.plain(count, device)
        return self._classes[key]
