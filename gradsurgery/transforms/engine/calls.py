"""The arguments of a module's call, cut to some of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradsurgery.errors import BatchError
from gradsurgery.transforms.engine.handlers import Call


def refuse_caches(path: str, call: Call) -> None:
    for value in (*call[0], *call[1].values()):
        if type(value).__name__.endswith("Cache"):
            raise BatchError(
                f"{path} runs once per class of rows, which a key-value cache forbids: pass use_cache=False."
            )


def lead_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    return tuple(first_tensor((args, kwargs)).shape[:-1])


def first_tensor(call: Call) -> Tensor:
    return next(x for x in (*call[0], *call[1].values()) if isinstance(x, Tensor))


def replace_tensor(call: Call, old: Tensor, new: Tensor) -> Call:
    return tuple(new if x is old else x for x in call[0]), {k: new if x is old else x for k, x in call[1].items()}


def map_rows(call: Call, lead: tuple[int, ...], take: Callable[[Tensor], Tensor]) -> Call:
    """Every tensor argument with these leading dimensions, flattened to rows and cut."""

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or tuple(x.shape[: len(lead)]) != lead:
            return x
        return take(x.reshape(-1, *x.shape[len(lead) :]))

    return tuple(cut(x) for x in call[0]), {k: cut(x) for k, x in call[1].items()}
