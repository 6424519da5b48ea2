"""Names and shapes of a model's tensors, and which blocks of two models are of one make."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from gradsurgery.anatomy.quantised import shape_of

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: shape_of(tensor) for name, tensor in named}


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Every other name of a tied weight -> its first one."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def natural_of(name: str) -> tuple:
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split("."))


def canonical_of(name: str) -> str:
    return re.sub(r"(?<=[._])\d+(?=\.|$)", "*", name)


def kinds_of(model: nn.Module) -> list[list[frozenset[str]]]:
    """Of every list of modules with parameters, the names that each element holds."""
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 2}
    held: dict[str, dict[int, set[str]]] = {path: {} for path in lists}
    for name, _ in model.named_parameters():  # a weight shared by several elements is the first one's
        parts = name.split(".")
        for i in range(1, len(parts) - 1):
            if (path := ".".join(parts[:i])) in lists:
                held[path].setdefault(int(parts[i]), set()).add(canonical_of(".".join(parts[i + 1 :])))
    return [[frozenset(own.get(i, ())) for i in range(max(own) + 1)] for own in held.values() if own]


def signature_of(block: str, shapes: Shapes) -> tuple:
    inner = frozenset(canonical_of(n[len(block) :]) for n in shapes if is_under(n, block)) if block else frozenset()
    return canonical_of(block), inner


def lengths_of(shapes: Shapes) -> dict[str, int]:
    """Lengths of the lists of modules in which named tensors lie, by path."""
    lengths: dict[str, int] = {}
    for name in shapes:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                path = ".".join(parts[:i])
                lengths[path] = max(lengths.get(path, 0), int(part) + 1)
    return lengths


def within(shapes: Shapes) -> dict[str, list[str]]:
    """Names of the tensors in every module, ``""`` for all."""
    found: dict[str, list[str]] = {"": list(shapes)}
    for name in shapes:
        parts = name.split(".")
        for i in range(1, len(parts)):
            found.setdefault(".".join(parts[:i]), []).append(name)
    return found


def is_under(name: str, block: str) -> bool:
    return not block or name.startswith(block + ".")


def enclosing_of(scope: str, blocks: set[str]) -> str:
    while scope and scope not in blocks:
        scope = scope.rpartition(".")[0]
    return scope


def first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def config_of(model: nn.Module, path: str) -> Any:
    """Config of the innermost module around ``path`` that has one."""
    found, module = getattr(model, "config", None), model
    for part in path.split(".") if path else []:
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            break
        found = getattr(module, "config", None) or found
    return found
