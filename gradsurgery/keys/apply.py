"""Apply a key: weights, and what follows them (gradients, open slots, optimizer moments), all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradsurgery.errors import KeyStateError, PlanError
from gradsurgery.keys import configuration as state
from gradsurgery.keys.plan import KeyPlan
from gradsurgery.tensors import Exchange, is_sharded, settle, unreduced

if TYPE_CHECKING:
    from gradsurgery.keys.key import PermutationKey

Slots = Mapping[str, Mapping[str, Tensor]]
Follower = tuple[Exchange, dict[str, Tensor]]


def apply_(
    key: PermutationKey,
    base: nn.Module,
    plan: KeyPlan,
    gradients: bool,
    optimizer: Any = None,
    slots: Slots | None = None,
) -> None:
    """C1 -> C2."""
    held, fingerprint = state.configuration_of(base), key.fingerprint
    name = type(base).__name__
    if fingerprint in held.applied:
        raise KeyStateError(
            f"this {name} is already keyed (fingerprint {fingerprint}, C2). Call key.unapply_(model) first, or use "
            f"`with key.applied(model):`, which returns to C1 by itself."
        )
    mine = key.slots
    for other, taken in held.applied.items():
        if mine & taken:
            raise KeyStateError(
                f"this {name} is keyed by {other}, which moves some of the units that {fingerprint} moves; unapply it "
                f"first. Keys that are disjoint may be applied together."
            )
    before = held.now
    made = _swap(base, plan, gradients, optimizer, slots or {}, before)
    held = state.enter(base, fingerprint, mine, plan.weights.names)
    held.made[fingerprint] = made
    _note(held, base, gradients, fingerprint)
    if optimizer is not None:
        state.set_moments(_inner(optimizer), base, held.now)


def unapply_(
    key: PermutationKey,
    base: nn.Module,
    plan: KeyPlan,
    gradients: bool,
    optimizer: Any = None,
    slots: Slots | None = None,
) -> None:
    """C2 -> C1."""
    held, fingerprint = state.configuration_of(base), key.fingerprint
    if fingerprint not in held.applied:
        raise KeyStateError(
            f"key {fingerprint} is not applied to this {type(base).__name__}, which is in {state.show(held.now)}."
        )
    before = held.now
    _swap(base, plan, gradients, optimizer, slots or {}, before)
    made = held.made.get(fingerprint, [])
    held.applied.pop(fingerprint)
    now = held.now
    if gradients:
        drop_made(base, plan, made)
    _note(held, base, gradients, fingerprint)
    state.leave(base, fingerprint)
    if optimizer is not None:
        state.set_moments(_inner(optimizer), base, now)


def _swap(
    base: nn.Module, plan: KeyPlan, gradients: bool, optimizer: Any, slots: Slots, before: frozenset[str]
) -> list[str]:
    """Check everything, then exchange everything; returns the gradients that had to be made."""
    exchange = plan.weights
    settle(base)
    parameters = {name: base.get_parameter(name) for name in exchange.names}
    work: list[Follower] = [(exchange, dict(parameters))]
    if plan.buffers.swaps:
        work.append((plan.buffers, {name: base.get_buffer(name) for name in plan.buffers.names}))
    made: list[str] = []
    fresh: dict[str, Tensor] = {}
    late: dict[str, dict[str, Tensor]] = {}
    if gradients:
        if unreduced(base):
            raise PlanError(
                "FSDP holds gradients that it has not reduced, which cannot follow the weights: swap after a backward "
                "with model.set_requires_gradient_sync(True), or leave gradients where they are (gradients=False)."
            )
        found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if found:
            fresh = _missing(exchange, found, parameters)
            made = list(fresh)
            work.append((_present(plan, {**found, **fresh}), {**found, **fresh}))
        for slot, grads in slots.items():
            grads = {name: g for name, g in grads.items() if name in parameters}
            if grads:
                late[slot] = _missing(exchange, grads, parameters)
                work.append((_present(plan, {**grads, **late[slot]}), {**grads, **late[slot]}))
    if optimizer is not None:
        work.extend(_moments(plan, base, parameters, _inner(optimizer), before))
    run(work)
    settle(base)
    for name, gradient in fresh.items():
        parameters[name].grad = gradient
    for slot, filled in late.items():
        slots[slot].update(filled)  # type: ignore[attr-defined]
    return made


def run(work: Sequence[Follower]) -> None:
    """Check everything, then exchange everything; on an exception, what was exchanged is exchanged back."""
    for one, tensors in work:
        check_tensors(one, tensors)
    done: list[Follower] = []
    try:
        for one, tensors in work:
            one(tensors)
            done.append((one, tensors))
    except BaseException:
        for one, tensors in done:
            one(tensors)
        raise


def turn_moments(base: nn.Module, plan: KeyPlan, optimizer: Any, fingerprint: str) -> None:
    """The moments alone, to where the key takes them or back; the weights stay."""
    inner = _inner(optimizer)
    now = state.moments_of(inner, base)
    parameters = {name: base.get_parameter(name) for name in plan.weights.names}
    run(_moments(plan, base, parameters, inner, now))
    state.set_moments(inner, base, now ^ {fingerprint})


def check_tensors(exchange: Exchange, tensors: Mapping[str, Tensor]) -> None:
    """Raise ``PlanError`` before anything moves where two ends of a swap do not fit each other."""
    for swap in exchange.swaps:
        a, b = tensors[swap.a.name], tensors[swap.b.name]
        names = f"{swap.a.name} and {swap.b.name}"
        if a.is_meta or b.is_meta:
            raise PlanError(f"{names} are on the meta device and hold nothing to swap; load the weights first.")
        if a.layout is not torch.strided or b.layout is not torch.strided:
            raise PlanError(f"{names} are {a.layout} and {b.layout}; only dense tensors can be swapped.")
        if a.dtype != b.dtype:
            raise PlanError(f"{names} are {a.dtype} and {b.dtype}, and a swap is exact only within one dtype.")
        if is_sharded(a) != is_sharded(b):
            raise PlanError(f"of {names} only one is sharded; shard both alike (fully_shard) or neither.")


def _missing(
    exchange: Exchange, found: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Zeros for tensors without a gradient whose partner has one."""
    lacking = set()
    for swap in exchange.swaps:
        ends = {swap.a.name, swap.b.name}
        if ends & found.keys():
            lacking |= ends - found.keys()
    return {name: torch.zeros_like(parameters[name].detach()) for name in exchange.names if name in lacking}


def _present(plan: KeyPlan, tensors: Mapping[str, Tensor]) -> Exchange:
    """The exchange without tensors that have nothing to move."""
    if len(tensors) == len(plan.weights.names):
        return plan.weights
    return plan.part(frozenset(tensors))


def drop_made(base: nn.Module, plan: KeyPlan, made: Sequence[str]) -> None:
    """Take gradients away that were made for a swap and hold nothing, or came back to weights that do not train.

    They would let weight decay at the weights.
    """
    for name in plan.weights.names:
        parameter = base.get_parameter(name)
        empty = parameter.grad is not None and name in made and not bool(parameter.grad.any())
        if empty or not parameter.requires_grad:
            parameter.grad = None


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's and other wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise PlanError(f"optimizer takes a torch optimizer, not {type(optimizer).__name__}.")
        optimizer = inner
    return optimizer


def _moments(
    plan: KeyPlan,
    base: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    before: frozenset[str],
) -> list[Follower]:
    """The moments by their name, each over all parameters.

    Raises:
        KeyStateError: the moments are in another configuration than the weights.
        PlanError: moments that are not laid out like the weights, or that only one end of a swap has.
    """
    if (made_in := state.moments_of(optimizer, base)) != before and state.has_moments(optimizer, base):
        raise KeyStateError(
            f"the moments of {type(optimizer).__name__} are in {state.show(made_in)} and the model in "
            f"{state.show(before)}; what moves together must start together."
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or not value.dim():
                continue
            if value.shape != parameter.shape or not value.dtype.is_floating_point:
                raise PlanError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as {value.dtype} {list(value.shape)}, which "
                    f"cannot follow swapped units (factored or quantised moments); use AdamW, or step in one "
                    f"configuration always."
                )
            found.setdefault(str(key), {})[name] = value
    out: list[Follower] = []
    for key, tensors in found.items():
        for swap in plan.weights.swaps:
            if (swap.a.name in tensors) != (swap.b.name in tensors):
                has, lacks = sorted((swap.a.name, swap.b.name), key=lambda n: n not in tensors)
                raise PlanError(
                    f"{type(optimizer).__name__} has {key} of {has} and none of {lacks}, with which the key swaps; let "
                    f"both train (no grad=None at the first step)."
                )
        out.append((_present(plan, tensors), tensors))
    return out


def _note(held: state.Configuration, base: nn.Module, gradients: bool, fingerprint: str) -> None:
    """Remember by which keys gradients and weights differ, and whether gradients were added to meanwhile."""
    stale = held.stale if held.stale is not None and held.stale.there(base) else None
    keys, mixed = (stale.keys, stale.mixed) if stale is not None else (state.C1, False)
    if not gradients:
        mixed = mixed or (stale is not None and stale.changed(base))
        keys ^= {fingerprint}
    found = state.Stale.of(base, keys, mixed)
    held.stale = found if found.held and (keys or mixed) else None
