"""Fused experts with some of their activations zeroed or detached, where no module input could be edited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.transforms.engine.adjoint import only_entries, parameter_of, swapped, without_entries
from gradsurgery.transforms.engine.calls import first_tensor, replace_tensor
from gradsurgery.transforms.engine.handlers import Call
from gradsurgery.transforms.engine.program import InputEdit, box_columns


def run_without(
    module: nn.Module, call: Call, weights: dict[str, Tensor], edits: list[tuple[str, InputEdit]]
) -> Tensor:
    """Experts with some of their activations zeroed or detached; affine in the consumer weight, so the two are split.

    ``y = f(W without the cut) + [f*(W of the detached alone) - f*(0)]``, ``f*`` with all before the consumer detached.
    """
    args, kwargs = call
    boxes: dict[str, dict[str, list[Any]]] = {}
    for attribute, edit in edits:
        kinds = boxes.setdefault(attribute, {"zero": [], "detach": []})
        kinds[edit.kind] += [box_columns(box, edit.entries.shape) for box in edit.entries.boxes()]
    full = {name: weights.get(name, parameter_of(module, name)) for name in {*weights, *boxes}}
    cut = {name: without_entries(full[name], k["zero"] + k["detach"]) for name, k in boxes.items()}  # type: ignore[arg-type]
    with swapped(module, {**full, **cut}):  # type: ignore[dict-item]
        y = module.forward(*args, **kwargs)
    if any(kinds["detach"] for kinds in boxes.values()):
        first = first_tensor(call)
        call = replace_tensor(call, first, first.detach())
        others = {n: p.detach() for n, p in module._parameters.items() if p is not None and n not in boxes}
        only = {name: only_entries(full[name], k["detach"], k["zero"]) for name, k in boxes.items()}  # type: ignore[arg-type]
        with swapped(module, {**others, **only}):
            alone = module.forward(*call[0], **call[1])
        with swapped(module, {**others, **{name: torch.zeros_like(only[name]) for name in boxes}}):
            y = y + (alone - module.forward(*call[0], **call[1]))
    return y
