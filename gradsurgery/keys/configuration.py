"""Which configuration a model is in: C1, or C2 under some keys; and the guards that stand while it is not C1.

A keyed model refuses to be saved and to be loaded into. An optimizer whose moments, or a gradient that, were made in
another configuration than the weights now are in is refused at the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradsurgery.errors import KeyStateError

HELD = "_gradsurgery_keys"
C1: frozenset[str] = frozenset()


@dataclass
class Stale:
    """Gradients that stayed where they were when the weights moved.

    Attributes:
        keys: Fingerprints of the keys by which they and the weights differ.
        held: The gradients, weakly, with their versions.
        mixed: Some of them were added to while they differed.
    """

    keys: frozenset[str]
    held: list[tuple[weakref.ref[Tensor], int]]
    mixed: bool = False

    @classmethod
    def of(cls, base: nn.Module, keys: frozenset[str], mixed: bool = False) -> Stale:
        grads = [p.grad for p in base.parameters() if p.grad is not None]
        return cls(keys, [(weakref.ref(g), g._version) for g in grads], mixed)

    def there(self, base: nn.Module) -> bool:
        """Whether a parameter still has one of them."""
        now = {id(p.grad) for p in base.parameters() if p.grad is not None}
        return any((g := grad()) is not None and id(g) in now for grad, _ in self.held)

    def changed(self, base: nn.Module) -> bool:
        """Whether gradients came, or were added to."""
        known = {id(g): version for grad, version in self.held if (g := grad()) is not None}
        grads = [p.grad for p in base.parameters() if p.grad is not None]
        return any(known.get(id(g)) != g._version for g in grads)


@dataclass
class Configuration:
    """What a model carries of the keys that are applied to it.

    Attributes:
        applied: Slots moved, by fingerprint of the applied keys, in their order.
        made: By fingerprint, names of gradients that were made for it (zeros), to be taken away again.
        stale: Gradients that are in another configuration than the weights.
        guards: Ids of the hooks on each module, so that a copy of the model can be unkeyed as well.
        base: The model, weakly.
    """

    applied: dict[str, frozenset[Any]] = field(default_factory=dict)
    made: dict[str, list[str]] = field(default_factory=dict)
    stale: Stale | None = None
    guards: dict[str, tuple[int, int]] = field(default_factory=dict)
    base: weakref.ref[nn.Module] | None = None

    @property
    def now(self) -> frozenset[str]:
        return frozenset(self.applied)

    def __deepcopy__(self, memo: Any) -> Configuration:
        out = Configuration(dict(self.applied), {k: list(v) for k, v in self.made.items()}, None, dict(self.guards))
        twin = memo.get(id(self.base())) if self.base is not None else None  # the copy that this becomes a part of
        if isinstance(twin, nn.Module):
            out.base = weakref.ref(twin)
            watch(twin)
        return out

    def __reduce__(self) -> Any:
        raise KeyStateError(
            f"a model that is keyed ({show(self.now)}) was about to be pickled, and what is saved must be C1. Call "
            f"key.unapply_(model) first; copy.deepcopy(model) makes a keyed copy."
        )


def configuration_of(base: nn.Module) -> Configuration:
    """What a model carries; a C1 model that never was keyed carries nothing."""
    held = base.__dict__.get(HELD)
    return held if isinstance(held, Configuration) else Configuration()


def require_c1(base: nn.Module, what: str) -> None:
    """Raise ``KeyStateError`` where a key is applied to a model that ``what`` needs in C1."""
    if now := configuration_of(base).now:
        raise KeyStateError(
            f"{what} needs the model in C1, and it is keyed ({show(now)}). Call key.unapply_(model) first."
        )


def show(configuration: frozenset[str]) -> str:
    return f"C2, key {' and '.join(sorted(configuration))}" if configuration else "C1"


def enter(base: nn.Module, fingerprint: str, slots: frozenset[Any], names: Iterable[str]) -> Configuration:
    """Note that a key is applied, and put the guards up."""
    held = configuration_of(base)
    base.__dict__[HELD] = held
    held.applied[fingerprint], held.base = slots, weakref.ref(base)
    held.guards.update(guard(base, names, held.guards))
    watch(base)
    return held


def leave(base: nn.Module, fingerprint: str) -> None:
    """Note that a key is not applied any more; the last one takes the guards down."""
    held = configuration_of(base)
    held.applied.pop(fingerprint, None)
    held.made.pop(fingerprint, None)
    if not held.applied:
        unguard(base, held.guards)
        held.guards = {}
        if held.stale is None:
            base.__dict__.pop(HELD, None)


def guard(base: nn.Module, names: Iterable[str], known: Container[str] = ()) -> dict[str, tuple[int, int]]:
    """Hooks that refuse saving and loading, on the model and on every module that holds moved weights."""
    paths = {""}
    for name in names:
        parts = name.split(".")[:-1]
        paths.update(".".join(parts[:k]) for k in range(1, len(parts) + 1))
    out = {}
    for path in (path for path in paths if path not in known):
        module = base.get_submodule(path)
        save = module.register_state_dict_pre_hook(_refuse_saving)
        load = module.register_load_state_dict_pre_hook(_refuse_loading)
        out[path] = save.id, load.id
    return out


def unguard(base: nn.Module, guards: dict[str, tuple[int, int]]) -> None:
    for path, (save, load) in guards.items():
        module = base.get_submodule(path)
        module._state_dict_pre_hooks.pop(save, None)
        module._load_state_dict_pre_hooks.pop(load, None)


def _refuse_saving(module: nn.Module, *_: Any) -> None:
    raise KeyStateError(
        f"this {type(module).__name__} is keyed (C2), and what is saved must be C1, or the key would be lost in it. "
        f"Call key.unapply_(model) first, or save outside of `with key.applied(model):`."
    )


def _refuse_loading(module: nn.Module, *_: Any) -> None:
    raise KeyStateError(
        f"this {type(module).__name__} is keyed (C2): weights loaded now would count as C2's, and stored ones are "
        f"C1's. Call key.unapply_(model) first."
    )


# gradients and moments

MOMENTS = "gradsurgery_keys"
"""Entry of a parameter group whose moments are not in C1: fingerprints. It is saved and loaded with the moments."""
_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_STEPPED_UNDER: weakref.WeakKeyDictionary[torch.optim.Optimizer, str] = weakref.WeakKeyDictionary()
"""Fingerprint of the key that is applied for the time of an optimizer's steps."""
_hooks: list[Any] = []


def watch(base: nn.Module) -> None:
    """From now on, look at every optimizer's step whether it fits the model's configuration."""
    _WATCHED.add(base)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def moments_of(optimizer: torch.optim.Optimizer, base: nn.Module) -> frozenset[str]:
    """The configuration in which an optimizer's moments of a model are."""
    return next((frozenset(group.get(MOMENTS, "").split()) for group in _groups(optimizer, base)), C1)


def set_moments(optimizer: torch.optim.Optimizer, base: nn.Module, configuration: frozenset[str]) -> None:
    """Note in which configuration moments are."""
    watch(base)
    for group in _groups(optimizer, base):
        if configuration:
            group[MOMENTS] = " ".join(sorted(configuration))
        else:
            group.pop(MOMENTS, None)


def _groups(optimizer: torch.optim.Optimizer, base: nn.Module) -> Iterator[dict[str, Any]]:
    """The parameter groups that hold parameters of a model."""
    mine = {id(p) for p in base.parameters()}
    return (group for group in optimizer.param_groups if any(id(p) in mine for p in group["params"]))


def has_moments(optimizer: torch.optim.Optimizer, base: nn.Module) -> bool:
    return any(
        isinstance(value, Tensor) and value.dim()
        for p in base.parameters()
        for value in optimizer.state.get(p, {}).values()
    )


def _holds(optimizer: torch.optim.Optimizer, base: nn.Module) -> bool:
    return any(True for _ in _groups(optimizer, base))


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for base in list(_WATCHED):
        held = configuration_of(base)
        made_in = moments_of(optimizer, base)
        if held.stale is None and held.now == made_in:
            continue
        if not _holds(optimizer, base):
            continue
        check_step(optimizer, base, held, held.now if optimizer in _STEPPED_UNDER else made_in)


def check_step(optimizer: torch.optim.Optimizer, base: nn.Module, held: Configuration, made_in: frozenset[str]) -> None:
    """Raise ``KeyStateError`` where weights, gradients and moments are not in one configuration."""
    name, model = type(optimizer).__name__, type(base).__name__
    if held.stale is not None and held.stale.there(base):
        if held.stale.mixed:
            raise KeyStateError(
                f"gradients of {model} were added to while they were in another configuration than its weights: swap "
                f"with gradients=True, or set them to None before a backward in C2."
            )
        raise KeyStateError(
            f"{model} is in {show(held.now)} and its gradients in {show(held.now ^ held.stale.keys)}: stepping would "
            f"give them to the wrong weights. Swap with gradients=True, or set them to None after swapping."
        )
    if held.now != made_in and has_moments(optimizer, base):
        raise KeyStateError(
            f"{model} is in {show(held.now)} and the moments of {name} in {show(made_in)}: stepping would mix those of "
            f"different units. Step in one configuration always, or swap with optimizer=optimizer, so that they follow."
        )


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    under = frozenset([_STEPPED_UNDER[optimizer]]) if optimizer in _STEPPED_UNDER else C1
    for base in list(_WATCHED):
        now = configuration_of(base).now ^ under
        if (now or moments_of(optimizer, base)) and _holds(optimizer, base):
            set_moments(optimizer, base, now)


def step_under(optimizer: torch.optim.Optimizer, fingerprint: str | None) -> None:
    """From now on a key is applied around the optimizer's steps, or (None) no more."""
    if fingerprint is None:
        _STEPPED_UNDER.pop(optimizer, None)
    else:
        _STEPPED_UNDER[optimizer] = fingerprint
