"""Which config describes the pruned model: found by building candidates on ``meta``, not in a table of names.

A candidate changes config attributes whose value is a count of units before pruning to the count after it; it is right
when every parameter of the class built from it has the pruned shape.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

Change = tuple[tuple[str, ...], Any]
"""``(path through sub-configs, new value)``."""
Shapes = dict[str, tuple[int, ...]]
LIMIT = 512
"""Candidates that are built at most."""


def built(model: nn.Module, config: Any, buffers: bool = False) -> nn.Module:
    """The same class from ``config``, without storage; ``buffers``: for its parameters alone."""
    with torch.random.fork_rng(devices=[]):
        if not buffers:
            with torch.device("meta"):
                return type(model)(config)
        handle = register_module_parameter_registration_hook(_without_storage)  # type: ignore[arg-type]
        try:
            return type(model)(config)
        finally:
            handle.remove()


def _without_storage(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def configs_within(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A config and its sub-configs, with their paths."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs_within(value, (*path, name))


def changed(config: Any, changes: Sequence[Change]) -> Any:
    """A copy of ``config`` with changes, as it reads when it has been saved and loaded again."""
    config = copy.deepcopy(config)
    for path, value in changes:
        owner = config
        for name in path[:-1]:
            owner = getattr(owner, name)
        setattr(owner, path[-1], value)
    loaded = type(config).from_dict(config.to_dict())
    loaded._attn_implementation = config._attn_implementation
    return loaded


def solutions(
    model: nn.Module,
    target: Shapes,
    counts: Sequence[tuple[int, int]],
    widths: Sequence[int],
    refusals: list[str],
) -> Iterator[Any]:
    """Configs from which the class of ``model`` has the shapes ``target``, likeliest first.

    Args:
        model: The model to be pruned.
        target: Shape of every parameter after pruning.
        counts: ``(before, after)`` of units.
        widths: Rows of a unit: sizes that a class may derive from counts unless the config states them.
        refusals: Gets what the class says against candidates.
    """
    before = shapes_of(model)
    tries = 0
    alone: dict[Change, str] = {}
    for change in _candidates(model.config, counts):
        alone[change] = _effect(model, change, before, target, refusals)
    moving, risky, all_of_them = (
        [change for change, effect in alone.items() if effect in effects]
        for effects in (("moves",), ("moves", "fails"), ("moves", "fails", "idle"))
    )
    extras: list[tuple[Change, ...]] = [(), *[(change,) for change in _stated_widths(model.config, widths)]]
    seen: set[tuple[Change, ...]] = set()
    for pool in (moving, risky, all_of_them):
        for size in range(len(pool), 0, -1):
            for subset in itertools.combinations(pool, size):
                if len({path for path, _ in subset}) < size or subset in seen:
                    continue
                seen.add(subset)
                for extra in extras:
                    if (tries := tries + 1) > LIMIT:
                        return
                    if (config := _fitting(model, (*subset, *extra), target, refusals)) is not None:
                        yield config


def _candidates(config: Any, counts: Sequence[tuple[int, int]]) -> Iterator[Change]:
    """Attributes that equal a count; then those that are None, for which a class may derive it."""
    for wanted in (False, True):
        for path, owner in configs_within(config):
            for name, value in vars(owner).items():
                for before, after in dict.fromkeys(counts):
                    is_count = type(value) is int and value == before
                    if (value is None if wanted else is_count) and not name.startswith("_"):
                        yield (*path, name), after


def _stated_widths(config: Any, widths: Sequence[int]) -> Iterator[Change]:
    """``head_dim``, which classes otherwise derive from the number of heads."""
    for path, owner in configs_within(config):
        if getattr(owner, "head_dim", None) is None:
            for width in dict.fromkeys(widths):
                yield (*path, "head_dim"), width


def _effect(model: nn.Module, change: Change, before: Shapes, target: Shapes, refusals: list[str]) -> str:
    """What one change does alone: ``moves`` shapes that must move, is ``idle``, ``spoils`` others, or ``fails``."""
    is_guess = _value_at(model.config, change[0]) is None
    try:
        shapes = shapes_of(built(model, changed(model.config, [change])))
    except Exception:  # a config that is wrong in any way is not the one
        return "spoils" if is_guess else "fails"
    if shapes == before:
        return "spoils" if is_guess else "idle"
    if shapes.keys() == before.keys() and all(shapes[n] == before[n] for n in before if before[n] == target[n]):
        return "moves"
    if not is_guess and any(shapes.get(n) != before[n] != target[n] for n in before):
        refusals.append(_mismatch(shapes, target))
    return "spoils"


def _value_at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _fitting(model: nn.Module, changes: Sequence[Change], target: Shapes, refusals: list[str]) -> Any | None:
    try:
        config = changed(model.config, changes)
        shapes = shapes_of(built(model, config))
        if shapes == target:
            return config
        refusals.append(_mismatch(shapes, target))
        return None
    except Exception as error:  # as above
        refusals.append(str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__)
        return None


def _mismatch(made: Shapes, target: Shapes) -> str:
    name = next(n for n in {**target, **made} if made.get(n) != target.get(n))
    has, wanted = (list(shapes[name]) if name in shapes else "absent" for shapes in (made, target))
    return f"the class would make {name} {has} where {wanted} is left"
