"""Gradient slots: ``"main"`` is ``.grad``; every other slot is a named gradient of the same layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from gradsurgery.errors import SlotError


class Slots(Mapping[str, dict[str, Tensor]]):
    """The named gradients of one optimizer step.

    A slot is filled by installing it as ``.grad`` before its backward, so that DDP reduces it like any gradient.
    """

    def __init__(self) -> None:
        self._grads: dict[str, dict[str, Tensor]] = {}

    def __getitem__(self, slot: str) -> dict[str, Tensor]:
        if slot not in self._grads:
            have = ", ".join(("main", *self._grads))
            raise SlotError(f"slot {slot!r} was not filled in this step (filled: {have}). Give a pass into={slot!r}.")
        return self._grads[slot]

    def __iter__(self) -> Iterator[str]:
        return iter(self._grads)

    def __len__(self) -> int:
        return len(self._grads)

    def clear(self) -> None:
        self._grads.clear()

    @contextmanager
    def installed(self, slot: str, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """``.grad`` is this slot inside the block; the main gradient comes back after it, also on an exception."""
        if slot == "main":
            yield
            return
        main = {name: p.grad for name, p in parameters.items()}
        mine = self._grads.get(slot, {})
        for name, p in parameters.items():
            p.grad = mine.get(name)
        try:
            yield
            self._grads[slot] = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        finally:
            for name, p in parameters.items():
                p.grad = main[name]
