"""Slots as transforms see them: ``"main"`` is ``.grad``, others are named gradients; vectors of slots and memories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import SlotError
from gradsurgery.tensors import aligned, is_sharded
from gradsurgery.transforms.stages import StepContext


def read(context: StepContext, slot: str, what: str) -> dict[str, Tensor]:
    """The gradients of a slot, by parameter name.

    Raises:
        SlotError: it was not filled in this step.
    """
    if slot != "main":
        return dict(context.slots[slot])
    found = {name: p.grad for name, p in context.parameters.items() if p.grad is not None}
    if not found:
        raise SlotError(f"{what}: no parameter has a gradient (slot 'main'); call surgery.backward before the step.")
    return found


def write(context: StepContext, slot: str, grads: Mapping[str, Tensor]) -> None:
    """Put gradients into a slot, made if it is not there; others of the slot stay."""
    if slot == "main":
        for name, grad in grads.items():
            context.parameters[name].grad = grad
        return
    held: Any = context.slots
    if hasattr(held, "put"):
        held.put(slot, grads)
    else:
        held.setdefault(slot, {}).update(grads)


def vectors_of(context: StepContext, sources: Iterable[Any], what: str) -> list[dict[str, Tensor]]:
    """The vectors that slots and memories hold, laid out over ranks as the parameters are."""
    out: list[dict[str, Tensor]] = []
    for source in sources:
        given = [read(context, source, what)] if isinstance(source, str) else [dict(v) for v in source.vectors]
        for vector in given:
            if unknown := set(vector) - set(context.parameters):
                name = sorted(unknown)[0]
                raise SlotError(f"{what}: a vector has entries of {name!r}, which the model does not have.")
            out.append({name: fitted(value, context.parameters[name], what, name) for name, value in vector.items()})
    return out


def fitted(value: Tensor, parameter: Tensor, what: str, name: str) -> Tensor:
    """A vector's tensor where the parameter lies."""
    if value.shape != parameter.shape:
        raise SlotError(
            f"{what}: a vector's {name!r} is {list(value.shape)}, the parameter {list(parameter.shape)}; it was made "
            f"for another model."
        )
    same = value.device == parameter.device and is_sharded(value) == is_sharded(parameter)
    if same and (not is_sharded(value) or value.placements == parameter.placements):  # type: ignore[attr-defined]
        return value
    return aligned(value.detach(), parameter.detach())


def zeros_like(
    context: StepContext, name: str, slot: Mapping[str, Tensor], vectors: Iterable[Mapping[str, Tensor]]
) -> Tensor:
    """Zeros for a parameter without a gradient in a slot, laid out over ranks as the parameter is."""
    like = [vector[name].dtype for vector in (slot, *vectors) if name in vector]
    return torch.zeros_like(context.parameters[name].detach(), dtype=like[0] if like else None)


def require_finite(slots: Mapping[str, Mapping[str, Tensor]], what: str) -> None:
    """Raise a ``SlotError`` that names the slot and the parameter in which nan or inf lies."""
    for slot, grads in slots.items():
        for name, grad in grads.items():
            local = grad.to_local() if is_sharded(grad) else grad  # type: ignore[attr-defined]
            if not torch.isfinite(local).all():
                raise SlotError(
                    f"{what}: slot {slot!r} holds nan or inf in {name!r}; its loss or backward overflowed. Skip the "
                    f"batch, or lower the learning rate or the scaler's scale."
                )
    names = ", ".join(map(repr, slots))
    raise SlotError(f"{what}: one of the slots {names} holds nan or inf on another rank; its own message says where.")
