"""Which rows of a module's input or output label flags mean: only layouts that can be told, never guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import BatchError

Shape = tuple[int, int] | None
"""``(batch, tokens)`` of a pass, where it is known."""


def check_column(name: str, flags: Any) -> Tensor:
    """A label column as it must be: a bool tensor ``[batch]`` or ``[batch, token]``."""
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.dim() not in (1, 2):
        given = f"{flags.dtype} {list(flags.shape)}" if isinstance(flags, Tensor) else type(flags).__name__
        raise BatchError(f"label column {name!r} must be a bool tensor [batch] or [batch, token], not {given}.")
    return flags


def check_size(flags: Tensor, shape: Shape) -> Tensor:
    if shape is not None and flags.shape[0] != shape[0]:
        raise BatchError(f"flags {list(flags.shape)} speak of {flags.shape[0]} examples; the batch has {shape[0]}.")
    return flags


def uniform(flags: Tensor) -> bool:
    """Whether every row is treated alike, whatever its example."""
    return bool(flags.all()) or not bool(flags.any())


def expand_flags(flags: Tensor, lead: tuple[int, ...], path: str, shape: Shape = None, checked: bool = True) -> Tensor:
    """``[batch]`` or ``[batch, token]`` flags for an input whose leading dimensions are ``lead``.

    Examples come first: ``[batch, token, …]``, ``[batch, head, token]``, or flattened ``[batch * token]``. Flags that
    are alike for all rows fit every layout; flags that are alike for all tokens of an example need no token dimension.
    ``checked=False`` lets uniform flags pass where the input cannot say how many examples there are.
    """
    if (found := _placed(flags, lead, shape)) is not None:
        return found
    if flags.dim() == 2 and bool((flags == flags[:, :1]).all()):
        found = _placed(flags[:, 0], lead, shape)
        if found is not None:
            return found
    if uniform(flags) and (shape is not None or not checked or _may_hold(flags.shape[0], lead)):
        return flags.reshape(-1)[:1].reshape([1] * len(lead)).expand(lead)
    raise BatchError(
        f"flags {list(flags.shape)} do not fit the input of {path}, whose leading dimensions are {list(lead)}: its "
        f"rows cannot be told apart by example. Leave this module out of the region, or pass flags of its own shape"
        + (" (another sequence length, or flags [batch], where two dimensions agree)." if flags.dim() == 2 else ".")
    )


def _placed(flags: Tensor, lead: tuple[int, ...], shape: Shape) -> Tensor | None:
    """The flags where the layout is plain; None where it is not."""
    batch = flags.shape[0]
    if not lead:
        return None
    if flags.dim() == 1:
        if lead[0] == batch:
            return flags.reshape(batch, *[1] * (len(lead) - 1)).expand(lead)
        if len(lead) == 1 and is_flattened(lead[0], batch, None if shape is None else shape[1]):
            return flags.repeat_interleave(lead[0] // batch)
        return None
    if len(lead) == 1:
        return flags.reshape(-1) if lead[0] == flags.numel() else None
    tokens = [d for d in range(1, len(lead)) if lead[d] == flags.shape[1]]
    if lead[0] != batch or len(tokens) != 1:
        return None
    return at_tokens(flags, lead, tokens[0])


def at_tokens(flags: Tensor, lead: tuple[int, ...], dim: int) -> Tensor:
    """Flags for ``lead`` with its tokens at ``dim``."""
    sizes = [flags.shape[1] if d == dim and flags.dim() == 2 else 1 for d in range(1, len(lead))]
    return flags.reshape(flags.shape[0], *sizes).expand(lead)


def is_flattened(count: int, batch: int, tokens: int | None) -> bool:
    """Whether ``count`` rows are all tokens of all examples."""
    return count == batch * tokens if tokens is not None else count > batch and count % batch == 0


def _may_hold(batch: int, lead: tuple[int, ...]) -> bool:
    """Whether an input of unknown layout may hold ``batch`` examples: windows and sequence-first inputs may."""
    return len(lead) < 2 or lead[0] == 1 or lead[0] % batch == 0 or batch in lead


def output_flags(
    given: Sequence[Tensor], shape_out: tuple[int, ...], path: str, channels_first: bool, shape: Shape = None
) -> tuple[tuple[int, ...], list[Tensor]]:
    """The dimensions of an output that flags speak of, and the flags for them."""
    two = next((flags for flags in given if flags.dim() == 2), None)
    lead = shape_out[:1]
    if two is not None and not (shape_out and shape_out[0] == two.numel()) and len(shape_out) > 1:
        first = 2 if channels_first else 1
        inner = range(first, len(shape_out) if channels_first else max(len(shape_out) - 1, 2))
        dims = [d for d in inner if shape_out[d] == two.shape[1]]
        also = shape_out[-1] == two.shape[1] and len(shape_out) - 1 not in dims
        also = also and (len(shape_out) == 3 or not dims)  # [batch, head, query, key] has one token dimension
        if shape_out[0] == two.shape[0] and len(dims) + also == 1:
            dim = dims[0] if dims else len(shape_out) - 1
            lead = shape_out[: dim + 1]
            if all(flags.shape[0] == lead[0] and flags.shape[1:] in ((), two.shape[1:]) for flags in given):
                return lead, [at_tokens(flags, lead, dim) for flags in given]
    return lead, [expand_flags(flags, lead, path, shape) for flags in given]


def without_batch(
    ids_shape: tuple[int, ...], ids: Tensor | None, given: Sequence[Tensor], path: str, shape: Shape
) -> tuple[int, ...] | None:
    """The shape to which ids of an embedding fed without a batch (positions ``[token]`` or ``[1, token]``) expand.

    Raises:
        BatchError: as many ids as examples, which may be positions or one id per example.
    """
    batch = given[0].shape[0]
    compiling = torch.compiler.is_compiling()
    if not ids_shape or batch == 1:
        return None
    if len(ids_shape) > 1:
        return (batch, *ids_shape[1:]) if ids_shape[0] == 1 else None
    (count,) = ids_shape
    tokens = next((flags.shape[1] for flags in given if flags.dim() == 2), None if shape is None else shape[1])
    if not compiling and all(uniform(flags) for flags in given):
        return None
    if count == batch:
        consecutive = ids is None or (not compiling and bool((ids[1:] - ids[:-1] == 1).all()))
        if tokens == batch or (tokens is None and consecutive):
            raise BatchError(
                f"{path} is fed {count} ids for {batch} examples: positions without a batch, or one id per example? "
                f"Feed it [batch, token], or use another sequence length or batch size."
            )
        return None
    if tokens is not None and count == batch * tokens:
        return None
    if count == 1 and tokens != 1:
        return (batch,)
    return (batch, count)
