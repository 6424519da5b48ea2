"""What is projected: a gradient, or the way that parameters went in an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.tensors import (
    Box,
    Difference,
    gather,
    in_boxes_only,
    local_of,
    pieces,
    put_,
    subtract_,
    subtract_rows_,
)
from gradsurgery.tensors.dots import Flat
from gradsurgery.transforms.projection.layout import Part


def flat_of(tensor: Tensor | None, boxes: Sequence[Box] | None) -> list[Flat] | None:
    return None if tensor is None else list(pieces(tensor, boxes))


def rows_of(tensor: Tensor | None, boxes: Sequence[Box] | None) -> Tensor | None:
    """The local rows, zero outside of the boxes."""
    if tensor is None:
        return None
    return local_of(tensor if boxes is None else in_boxes_only(tensor, boxes))


class Target:
    """Tensors by parameter name that are projected in place.

    Args:
        tensors: What is changed.
        missing: Makes the tensor of a parameter that has none yet.
    """

    def __init__(self, tensors: Mapping[str, Tensor], missing: Callable[[str], Tensor] | None = None) -> None:
        self.tensors, self.missing = dict(tensors), missing
        self.made: dict[str, Tensor] = {}

    def flat(self, part: Part) -> list[Flat] | None:
        return flat_of(self.tensors.get(part.name), part.boxes)

    def rows(self, part: Part) -> Tensor | Difference | None:
        return rows_of(self.tensors.get(part.name), part.boxes)

    def subtract_(self, part: Part, vectors: Sequence[Tensor | None], factors: Any, keep: float) -> None:
        """``x <- keep * x - sum_k factors[k] * vectors[k]`` on the entries of a part.

        ``factors`` are numbers, or a tensor ``[rows, vectors]`` where rows are projected by themselves.
        """
        chosen = [k for k, vector in enumerate(vectors) if vector is not None]
        used = [v for v in vectors if v is not None]
        target = self.tensors.get(part.name)
        by_row = isinstance(factors, Tensor)
        if target is None:
            if (
                self.missing is None
                or not used
                or not any(bool(factors[..., k].any() if by_row else factors[k]) for k in chosen)
            ):
                return
            target = self.tensors[part.name] = self.made[part.name] = self.missing(part.name)
        if by_row:
            factors = factors[:, chosen]
            if part.boxes is None:
                subtract_rows_(local_of(target), [local_of(v) for v in used], factors, keep)
            else:
                inside = in_boxes_only(target, part.boxes)
                subtract_rows_(local_of(inside), [local_of(v) for v in used], factors, keep)
                put_(target, part.boxes, gather(inside, part.boxes))
            return
        factors = [factors[k] for k in chosen]
        if part.boxes is None:
            subtract_(local_of(target), [local_of(v) for v in used], factors, keep)
        elif any(factors) or keep != 1.0:
            inside_boxes, others = gather(target, part.boxes), [gather(v, part.boxes) for v in used]
            for k, one in enumerate(inside_boxes):
                subtract_(one, [other[k] for other in others], factors, keep)
            put_(target, part.boxes, inside_boxes)


class Moved(Target):
    """The way that parameters have gone since this was made: ``after - before``, which is never stored.

    Args:
        parameters: By name; what is taken off the way is taken off them.
        parts: The entries that are followed; they are copied.
    """

    def __init__(self, parameters: Mapping[str, Tensor], parts: Sequence[Part]) -> None:
        super().__init__({part.name: parameters[part.name].detach() for part in parts})
        self.before = {part: self._copy(part) for part in parts}

    def _copy(self, part: Part) -> list[Tensor]:
        tensor = self.tensors[part.name]
        return [local_of(tensor).clone()] if part.boxes is None else gather(tensor, part.boxes)

    def flat(self, part: Part) -> list[Flat] | None:
        now = pieces(self.tensors[part.name], part.boxes)
        return [Difference(a, b.reshape(-1)) for a, b in zip(now, self.before[part], strict=True)]

    def rows(self, part: Part) -> Tensor | Difference | None:
        tensor = self.tensors[part.name]
        if part.boxes is None:
            return Difference(local_of(tensor), self.before[part][0])
        before = torch.zeros_like(tensor)
        put_(before, part.boxes, self.before[part])
        return Difference(local_of(in_boxes_only(tensor, part.boxes)), local_of(before))

    def subtract_(self, part: Part, vectors: Sequence[Tensor | None], factors: Any, keep: float) -> None:
        if keep != 1.0:
            now = self._copy(part)
            for after, before in zip(now, self.before[part], strict=True):
                subtract_(after, [before], [keep - 1.0], keep)
            tensor = self.tensors[part.name]
            if part.boxes is None:
                local_of(tensor).copy_(now[0])
            else:
                put_(tensor, part.boxes, now)
        super().subtract_(part, vectors, factors, 1.0)

    def pieces(self, part: Part) -> list[Tensor]:
        """The entries of a part as they are now, flat."""
        return pieces(self.tensors[part.name], part.boxes)

    def matrix(self, vector: Tensor, part: Part) -> Tensor:
        """The local rows of another vector on a part."""
        found = rows_of(vector, part.boxes)
        assert found is not None
        return found

    def add_(self, part: Part, change: Tensor) -> None:
        """Add to the local rows of a part; ``change`` is zero outside of its boxes."""
        local = local_of(self.tensors[part.name])
        local.copy_(local.double() + change)
