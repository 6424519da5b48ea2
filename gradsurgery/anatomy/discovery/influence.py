"""What an entry still does to the output while a unit is read by nobody: the test that a declared unit is complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .draft import Draft, Slot
from .moves import fill_, restored, unit_values
from .node import cotangent
from .straight import CLIPPED
from .verify import Forward, Judge, consumers
from .wide import Wide


class Influence:
    """Which entries act on the output, and when the forward uses each tensor first.

    Args:
        forward: Outputs of a replica for fixed inputs.
        tensors: Its learned parameters and buffers.
    """

    def __init__(self, forward: Forward, tensors: dict[str, Tensor]) -> None:
        def smooth() -> list[Tensor]:
            with Smooth():
                return forward()

        self.judge, self.tensors = Judge(smooth, tensors), tensors
        self.slopes = self._slopes()
        touches = Touches(tensors)
        with torch.no_grad(), touches:
            smooth()
        self.first = touches.first

    def loudest(self, draft: Draft) -> Tensor:
        """The unit whose consumers the output hears best."""
        return unit_values(self.slopes, consumers(draft), draft.count).argmax().reshape(1)

    def silenced(self, draft: Draft, slot: Slot) -> bool:
        """Whether one consumer of a unit is heard, but no longer once the others are zero."""
        unit, others = self.loudest(draft), [s for s in consumers(draft) if s is not slot]
        with restored(self.tensors, others):
            fill_(self.tensors, others, unit, None)
            after = unit_values(self._slopes(), [slot], draft.count)[unit]
        return bool((unit_values(self.slopes, [slot], draft.count)[unit] > 0) & (after == 0))

    def lost(self, drafts: list[Draft]) -> dict[str, Tensor]:
        """Masks of the entries, but for the units' own, that have no gradient once a unit of each draft is not read."""
        reading = [slot for draft in drafts for slot in consumers(draft)]
        with restored(self.tensors, reading):
            for draft in drafts:
                fill_(self.tensors, consumers(draft), self.loudest(draft), None)
            after = self._slopes()
        least = 1e-9 * max(float(slope.abs().max()) for slope in self.slopes.values())  # key biases have rounding noise
        masks = {name: ((self.slopes[name].abs() > least) & (slope == 0)).double() for name, slope in after.items()}
        for draft in drafts:
            fill_(masks, draft.slots, self.loudest(draft), None)
        return {name: mask for name, mask in masks.items() if bool(mask.any())}

    @torch.no_grad()
    def hidden(self, draft: Draft, name: str, mask: Tensor) -> bool:
        """Whether other values of the masked entries leave the output alone while that unit is read by nobody."""
        with restored(self.tensors, [*consumers(draft), Slot(name, {})]):
            fill_(self.tensors, consumers(draft), self.loudest(draft), None)
            ablated = self.judge.forward()
            noise = torch.randn(mask.shape, generator=self.judge.generator, dtype=mask.dtype)
            self.tensors[name].add_(noise * mask)
            return self.judge.difference(self.judge.forward(), ablated) < self.judge.tolerance

    def _slopes(self) -> dict[str, Tensor]:
        """Gradient of a random functional of the outputs."""
        with torch.enable_grad():
            outputs = [x for x in self.judge.forward() if x.requires_grad]
            seeds = [cotangent(x) for x in outputs]
            found = torch.autograd.grad(outputs, list(self.tensors.values()), seeds, allow_unused=True)
        pairs = zip(self.tensors.items(), found, strict=True)
        return {name: torch.zeros_like(t) if g is None else torch.nan_to_num(g) for (name, t), g in pairs}


class Smooth(Wide):
    """Rectifiers leak: no unit elsewhere falls silent because what it reads has changed."""

    def __init__(self) -> None:
        super().__init__(scatter=True)

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        return F.leaky_relu(args[0], 0.3) if func in CLIPPED else super().call(func, args, kwargs)


class Touches(TorchFunctionMode):
    """In which order a forward uses the learned tensors first."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.owners = {t.untyped_storage().data_ptr(): name for name, t in reversed(tensors.items()) if t.numel()}
        self.first: dict[str, int] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._note([*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))

    def _note(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                name = self.owners.get(value.untyped_storage().data_ptr())
                if name is not None:
                    self.first.setdefault(name, len(self.first))
            elif isinstance(value, (list, tuple)):
                self._note(value)
