"""Gradient slots: ``"main"`` is ``.grad``; every other slot is a named gradient of the same layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsurgery.errors import SlotError
from gradsurgery.tensors import local_of, shards_of


@dataclass
class Filled:
    """When a slot was filled.

    Attributes:
        step: The optimizer step.
        window: The accumulation window, whose micro-batches add up; ``None`` for a slot that was refreshed by itself.
    """

    step: int
    window: int | None


@dataclass
class Probe:
    """One entry of the main gradient: it tells what the host has multiplied that by since (a scaler unscales it)."""

    parameter: nn.Parameter
    at: Tensor
    value: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> Probe | None:
        """The largest entry of the smallest gradient."""
        held = [p for p in model.parameters() if p.grad is not None and p.grad.numel()]
        if not held:
            return None
        parameter = min(held, key=lambda p: p.numel())
        flat = cls._flat(parameter)
        at = flat.abs().argmax() if flat.numel() else torch.zeros((), dtype=torch.long, device=flat.device)
        return cls(parameter, at, flat[at].clone() if flat.numel() else flat.new_zeros(()))

    @staticmethod
    def _flat(parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return local_of(parameter.grad).reshape(-1)

    def factor(self) -> float:
        """What the gradient was multiplied by, on all ranks; 1 where nothing can be seen."""
        found = torch.zeros((), dtype=torch.float64, device=self.value.device)
        if self.parameter.grad is not None and self._flat(self.parameter).numel() and self.value != 0:
            found = (self._flat(self.parameter)[self.at].double() / self.value.double()).nan_to_num(0.0, 0.0, 0.0)
        mesh, dims = shards_of(self.parameter)
        for dim in dims:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
        return float(found) or 1.0


class Slots(Mapping[str, dict[str, Tensor]]):
    """The named gradients of one optimizer step, and those that live longer.

    A slot is filled by installing it as ``.grad`` before its backward, so that DDP reduces it like any gradient.

    Args:
        keep: Steps that a slot serves, that of its filling included, by slot; 1 for those that are not named.
    """

    def __init__(self, keep: Mapping[str, int] | None = None) -> None:
        self.keep = dict(keep or {})
        self.filled: dict[str, Filled] = {}
        self.step = 0
        self._window = 0
        self._grads: dict[str, dict[str, Tensor]] = {}
        self._stale: dict[str, int] = {}

    def __getitem__(self, slot: str) -> dict[str, Tensor]:
        if slot in self._grads:
            return self._grads[slot]
        if slot in self._stale:
            raise SlotError(
                f"slot {slot!r} was filled in step {self._stale[slot]} and serves {self.keep.get(slot, 1)} steps; this "
                f"is step {self.step}. Run its pass more often, keep={self.step - self._stale[slot] + 1} or more, or "
                f"call surgery.refresh({slot!r}, batches)."
            )
        have = ", ".join(("main", *self._grads))
        raise SlotError(
            f"slot {slot!r} was not filled in this step (filled: {have}). Give a pass into={slot!r} and call "
            f"surgery.backward: a backward of your own fills .grad alone."
        )

    def __contains__(self, slot: object) -> bool:
        return slot in self._grads

    def __iter__(self) -> Iterator[str]:
        return iter(self._grads)

    def __len__(self) -> int:
        return len(self._grads)

    def put(self, slot: str, grads: Mapping[str, Tensor]) -> None:
        """Add gradients to a slot, by parameter name; it is made if it is not there."""
        self._grads.setdefault(slot, {}).update(grads)
        self.filled.setdefault(slot, Filled(self.step, self._window))

    def replace(self, slot: str, grads: Mapping[str, Tensor], step: int | None = None) -> None:
        """Fill a slot by itself, outside of any accumulation window."""
        self._grads[slot] = dict(grads)
        self.filled[slot] = Filled(self.step if step is None else step, None)
        self._stale.pop(slot, None)

    def clear(self) -> None:
        for held in (self._grads, self.filled, self._stale):
            held.clear()

    def next_window(self, step: int) -> None:
        """Forget the gradients of a window: all that no later step is to see.

        Args:
            step: Optimizer steps done. Where there was none since (a scaler skipped it), what the window filled is
                spoiled and goes, also if it was to be kept.
        """
        for slot, filled in list(self.filled.items()):
            skipped = filled.window == self._window and filled.step == step
            if skipped or step - filled.step >= self.keep.get(slot, 1):
                if not skipped and self.keep.get(slot, 1) > 1:
                    self._stale[slot] = filled.step
                del self.filled[slot], self._grads[slot]
        self._window += 1
        self.step = step

    def follow(self, factor: float) -> None:
        """Multiply what this window filled, as the main gradient was: scalers take their scale out of it alone."""
        for slot, filled in self.filled.items():
            if filled.window == self._window:
                for grad in self._grads[slot].values():
                    grad.mul_(factor)

    @contextmanager
    def anew(self, slot: str) -> Iterator[None]:
        """Inside the block a slot is filled from nothing, for no window; it is as it was before if that fails."""
        held, filled = self._grads.pop(slot, None), self.filled.pop(slot, None)
        try:
            yield
        except BaseException:
            self._grads.pop(slot, None)
            self.filled.pop(slot, None)
            if held is not None and filled is not None:
                self._grads[slot], self.filled[slot] = held, filled
            raise
        self.filled[slot] = Filled(self.step, None)

    @contextmanager
    def installed(self, slot: str, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """``.grad`` is this slot inside the block; the main gradient comes back after it, also on an exception.

        A kept slot of an earlier window is filled anew, not added to.
        """
        if slot == "main":
            yield
            return
        main = {name: p.grad for name, p in parameters.items()}
        before = self.filled.get(slot)
        adds_up = before is not None and before.window == self._window
        mine = self._grads.get(slot, {}) if adds_up else {}
        for name, p in parameters.items():
            p.grad = mine.get(name)
        try:
            yield
            self._grads[slot] = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            self.filled[slot] = Filled(self.step, self._window)
            self._stale.pop(slot, None)
        finally:
            for name, p in parameters.items():
                p.grad = main[name]
