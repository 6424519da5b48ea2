"""Dry runs: which entries one step would send gradient to, without a trace left in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.surgery.method import Method
from gradsurgery.surgery.surgery import Surgery
from gradsurgery.tensors import is_sharded
from gradsurgery.transforms.freeze import Freeze


@dataclass(frozen=True)
class DryRun:
    """What one step would move.

    Attributes:
        moved: Entries with a gradient that the update stage would let move, by parameter.
        total: All entries, by parameter.
        masks: Bool tensor of the moved entries, by parameter.
    """

    moved: dict[str, int]
    total: dict[str, int]
    masks: dict[str, torch.Tensor]

    def __str__(self) -> str:
        width = max(map(len, self.total))
        lines = [f"{'parameter'.ljust(width)}  would move  of entries"]
        for name, total in self.total.items():
            lines.append(f"{name.ljust(width)}  {self.moved[name]:>10,}  {total:>10,}")
        lines.append(f"{'all'.ljust(width)}  {sum(self.moved.values()):>10,}  {sum(self.total.values()):>10,}")
        return "\n".join(lines)


def dry_run(method: Method, model: nn.Module, batch: Mapping[str, Any]) -> DryRun:
    """Run the passes and the gradient stage once and look at the gradient; gradients, buffers, modes and random state
    come back. Slots that only ``surgery.refresh`` fills are filled from this batch; projections of the update are left
    out."""
    base = unwrap(model)
    before = {name: p.grad for name, p in base.named_parameters()}
    modes = {module: module.training for module in base.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in base.buffers()]  # BatchNorm's running statistics
    devices = {p.device for p in base.parameters() if p.device.type == "cuda"}
    surgery = Surgery(method, model)
    try:
        for p in base.parameters():
            p.grad = None
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            surgery._backward(batch)
            for slot in sorted(method.slots - {"main"} - surgery.slots.keys()):
                surgery.refresh(slot, [batch])
            surgery.finish()
        masks = {}
        for name, p in base.named_parameters():
            grad: Any = p.grad
            if grad is not None and is_sharded(grad):
                grad = grad.full_tensor()
            mask = grad.ne(0) if grad is not None else torch.zeros(p.shape, dtype=torch.bool)
            for transform in method.update:
                if isinstance(transform, Freeze) and transform.awake(surgery._stepper.ran):
                    mask = mask & ~transform.region.of(name).mask().to(mask.device)
            masks[name] = mask
    finally:
        surgery.remove()
        for name, p in base.named_parameters():
            p.grad = before[name]
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    return DryRun(counts, {name: mask.numel() for name, mask in masks.items()}, masks)
