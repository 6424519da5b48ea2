"""Who reads a parameter: usually the module that owns it, sometimes its parent (``F.linear(x, self.child.weight)``).

Hooks of a module that is never called would do nothing, so what a class reads of its children is taken from its source:
every ``self.child.parameter`` (of any depth) in a method that its forward
reaches, apart from mere properties such as ``self.child.weight.dtype``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_FACTS = {"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}
_SETUP = ("__init__", "_init_weights", "init_weights", "reset_parameters", "extra_repr")


@functools.cache
def read_of_children(owner: type[nn.Module]) -> frozenset[tuple[str, str]]:
    """``(child, parameter)`` that methods of a module class read by themselves, children of children as ``a.b``."""
    return frozenset((child, node.attr) for method in _methods(owner) for child, node in _read_nodes(method))


@functools.cache
def read_instead_of_called(owner: type[nn.Module]) -> frozenset[str]:
    """The children that methods of a module class call on some paths and read on others, never both on one path."""
    called: dict[str, list[_Place]] = {}
    read: dict[str, list[_Place]] = {}
    for k, method in enumerate(_methods(owner)):
        branches = _branches(method)
        for node in ast.walk(method):
            if isinstance(node, ast.Call) and (path := _path_from_self(node.func)):
                called.setdefault(path, []).append((k, branches[id(node)]))
        for path, node in _read_nodes(method):
            read.setdefault(path, []).append((k, branches[id(node)]))
    apart = (p for p in called if all(_exclude(a, b) for a in called[p] for b in read.get(p, ())))
    return frozenset(apart)


_Place = tuple[int, dict[int, bool]]
"""The method of an expression, and the branches of its ``if`` statements that it is in."""


def _exclude(one: _Place, other: _Place) -> bool:
    """Whether two expressions are in different methods or different branches."""
    return one[0] != other[0] or any(other[1].get(test, taken) != taken for test, taken in one[1].items())


def _branches(method: ast.AST) -> dict[int, dict[int, bool]]:
    out: dict[int, dict[int, bool]] = {}

    def visit(node: ast.AST, inside: dict[int, bool]) -> None:
        out[id(node)] = inside
        for field, value in ast.iter_fields(node):
            here = inside
            if isinstance(node, ast.If | ast.IfExp) and field in ("body", "orelse"):
                here = {**inside, id(node): field == "body"}
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, here)

    visit(method, {})
    return out


def _methods(owner: type[nn.Module]) -> list[ast.FunctionDef]:
    """The methods that a forward may run: those that it names, and those that they name."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in owner.__mro__:
        if base is nn.Module or base is object:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name not in _SETUP:
                methods.setdefault(node.name, []).append(node)
    found: dict[str, list[ast.FunctionDef]] = {}
    names: list[str] = [name for name in ("forward", "__call__") if name in methods] or list(methods)
    while names:
        if (name := names.pop()) not in found and name in methods:
            found[name] = methods[name]
            walked = [node for method in methods[name] for node in ast.walk(method)]
            names += [node.attr for node in walked if isinstance(node, ast.Attribute)]
            if any(_looks_up_by_name(node) for node in walked):
                names += list(methods)
    return [method for same in found.values() for method in same]


def _looks_up_by_name(node: ast.AST) -> bool:
    """``getattr(self, name)`` with a name that only the run knows."""
    is_getattr = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1
    return is_getattr and _is_self(node.args[0]) and not isinstance(node.args[1], ast.Constant)  # type: ignore[attr-defined]


def _read_nodes(method: ast.FunctionDef) -> Iterator[tuple[str, ast.Attribute]]:
    passed_over = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            passed_over.add(id(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "hasattr"):
            passed_over.update(map(id, node.args))
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load) or id(node) in passed_over:
            continue
        if child := _path_from_self(node.value):
            yield child, node


def _path_from_self(node: ast.expr) -> str:
    """``a.b`` of ``self.a.b`` or ``self.a["b"]``; empty where the expression is no such path."""
    if isinstance(node, ast.Attribute):
        name, above = node.attr, node.value
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        name, above = str(node.slice.value), node.value
    else:
        return ""
    if _is_self(above):
        return name
    path = _path_from_self(above)
    return f"{path}.{name}" if path else ""


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
