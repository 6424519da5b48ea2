"""Names of other packages that the library uses without a promise, found in its sources."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "gradsurgery"
PRIVATE = re.compile(r"_[a-zA-Z]\w*$")
CLASSES = {
    "gradsurgery.surgery.trainer": "SurgeryTrainer",
    "gradsurgery.integrations.trl_sft": "SurgerySFTTrainer",
    "gradsurgery.integrations.trl_grpo": "SurgeryGRPOTrainer",
    "gradsurgery.runs.train": "_InOrder",
}
"""Subclasses of trainers, by module."""


def names_used() -> dict[str, list[str]]:
    """Private attributes, names looked up by string and private imports that the library does not define itself, and
    where."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCES.rglob("*.py"))}
    own = {name for tree in trees.values() for node in ast.walk(tree) for name in defined(node)}
    found: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            for name in used(node):
                if PRIVATE.match(name.rpartition(".")[2]) and name not in own:
                    found[name].append(f"{path.relative_to(SOURCES)}:{getattr(node, 'lineno', 0)}")
    return dict(found)


def defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
        yield from [node.attr] * (node.value.id in ("self", "cls"))


def used(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called in ("getattr", "hasattr", "setattr", "delattr", "get", "pop"):
            yield from texts(node.args)
    elif isinstance(node, ast.Compare):
        yield from texts([node.left, *node.comparators])
    elif isinstance(node, ast.Tuple):
        yield from texts(node.elts)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("gradsurgery"):
        if any(part.startswith("_") and not part.startswith("__") for part in node.module.split(".")):
            yield node.module
        yield from (alias.name for alias in node.names)


def texts(nodes: list[ast.expr]) -> Iterator[str]:
    yield from (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def names_overridden() -> dict[str, dict[str, list[str]]]:
    """By class, the private methods of trainers that it overrides, with the parameters that they have there."""
    out: dict[str, dict[str, list[str]]] = {}
    for module, name in CLASSES.items():
        cls = getattr(importlib.import_module(module), name)
        foreign = [base for base in cls.__mro__ if not base.__module__.startswith("gradsurgery")]
        out[name] = {}
        for method in filter(PRIVATE.match, vars(cls)):
            if owner := next((base for base in foreign if method in vars(base)), None):
                out[name][method] = list(inspect.signature(vars(owner)[method]).parameters)
    return out


def source(dotted: str) -> str:
    """The source of a module, or of a class in one."""
    try:
        return inspect.getsource(importlib.import_module(dotted))
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return inspect.getsource(getattr(importlib.import_module(module), name))
