"""What ranks must agree on: a failure of one is a failure of all, instead of a collective that waits for ever."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist

from gradsurgery.errors import ArtefactError, GradsurgeryError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if grouped() else 0


def world_size() -> int:
    return dist.get_world_size() if grouped() else 1


def grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def quiet(call: Callable[..., T]) -> Callable[..., T]:
    """A function of torch's distributed checkpoint that says nothing of there being no process group."""

    def called(*args: Any, **kwargs: Any) -> T:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            return call(*args, **kwargs)

    return called


def together(call: Callable[[], T], what: str) -> T:
    """Run a call on every rank; where it fails on one, all raise.

    Raises:
        ArtefactError: it failed on another rank.
    """
    result: Any = None
    failed: Exception | None = None
    try:
        result = call()
    except Exception as error:
        failed = error
    if grouped():
        said: list[Any] = [None] * world_size()
        dist.all_gather_object(said, None if failed is None else f"{type(failed).__name__}: {failed}")
        elsewhere = next(((n, text) for n, text in enumerate(said) if text is not None), None)
        if failed is None and elsewhere is not None:
            raise ArtefactError(f"{what} failed on rank {elsewhere[0]}: {elsewhere[1]}")
    if isinstance(failed, OSError) and not isinstance(failed, GradsurgeryError):
        raise ArtefactError(f"{what} failed: {failed}") from failed
    if failed is not None:
        raise failed
    return result  # type: ignore[no-any-return]


def on_first(call: Callable[[], Any], what: str) -> None:
    """Run a call on rank 0 alone; every rank waits for it and fails with it."""
    together(call if rank() == 0 else lambda: None, what)
