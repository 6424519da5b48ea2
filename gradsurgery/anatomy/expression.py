"""The text form of selections, read back: ``"heads[:, -1:] | neurons[0, [3, 5]]"``, ``"~rest(kv_groups[:, 0])"``."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from gradsurgery.anatomy.indexing import PLURALS
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.units import Units
from gradsurgery.errors import SelectionError

if TYPE_CHECKING:
    from gradsurgery.anatomy.anatomy import Anatomy

_OPERATORS: dict[type, str] = {ast.BitOr: "__or__", ast.BitAnd: "__and__", ast.Sub: "__sub__"}
_CALLS = ("rest", "units_within", "region", "structure")


def parse_selection(text: str, anatomy: Anatomy) -> Region:
    """Evaluate a text form without executing code: names, subscripts, ``| & - ~`` and four methods of an anatomy.

    Raises:
        SelectionError: not a selection, or one that finds nothing.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise SelectionError(f"{text!r} is not a selection: {error.msg}. {_HELP}") from None
    try:
        out = _Reader(text, anatomy).read(tree)
    except (TypeError, AttributeError) as error:  # wrong number or kind of arguments
        raise SelectionError(f"{text!r} is not a selection: {error}. {_HELP}") from None
    if not isinstance(out, Region):
        raise SelectionError(f"{text!r} is not a selection. {_HELP}")
    return out


_HELP = "Write for example 'heads[:, -1:] | neurons[:, -64:]'."


class _Reader:
    def __init__(self, text: str, anatomy: Anatomy) -> None:
        self.text, self.anatomy = text, anatomy

    def read(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and (node.id in PLURALS.values() or node.id == "all"):
            return Region.whole(self.anatomy.space) if node.id == "all" else getattr(self.anatomy, node.id)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return getattr(self.region(node.left), _OPERATORS[type(node.op)])(self.region(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~self.region(node.operand)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            return self.units(node.value)[tuple(self.index(part) for part in node.slice.elts)]  # type: ignore[index]
        if isinstance(node, ast.Call) and not node.keywords:
            if isinstance(node.func, ast.Name) and node.func.id in _CALLS:
                return getattr(self.anatomy, node.func.id)(*[self.argument(a) for a in node.args])
            if isinstance(node.func, ast.Attribute) and node.func.attr == "named":
                return self.units(node.func.value).named(*[self.argument(a) for a in node.args])
        raise SelectionError(f"{self.text!r}: {ast.unparse(node)!r} is not part of a selection. {_HELP}")

    def region(self, node: ast.expr) -> Region:
        out = self.read(node)
        if not isinstance(out, Region):
            raise SelectionError(f"{self.text!r}: {ast.unparse(node)!r} is no region. {_HELP}")
        return out

    def units(self, node: ast.expr) -> Units:
        out = self.read(node)
        if not isinstance(out, Units):
            raise SelectionError(f"{self.text!r}: {ast.unparse(node)!r} has no units to choose from.")
        return out

    def argument(self, node: ast.expr) -> Any:
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        return ast.literal_eval(node) if is_text else self.read(node)

    def index(self, node: ast.expr) -> Any:
        try:
            if isinstance(node, ast.Slice):
                return slice(
                    *(None if p is None else int(ast.literal_eval(p)) for p in (node.lower, node.upper, node.step))
                )
            found = ast.literal_eval(node)
            if not all(isinstance(i, int) for i in (found if isinstance(found, list | tuple) else [found])):
                raise TypeError
            return found
        except (ValueError, TypeError):
            raise SelectionError(f"{self.text!r}: {ast.unparse(node)!r} is no index. {_HELP}") from None
