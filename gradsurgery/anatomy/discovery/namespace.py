"""Modules and tensors of one model by the paths that declared layouts give."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

from torch import nn

from gradsurgery.anatomy.layouts import Layout
from gradsurgery.errors import AnatomyError

from .names import natural_of
from .replica import learned


class Namespace:
    """Floating parameters and persistent buffers of a model under all their names; only names and shapes are read."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        canonical = {id(tensor): (name, buffer) for name, tensor, buffer in learned(model)}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.known = {n: (*canonical[id(t)], tuple(t.shape)) for n, t in named if id(t) in canonical}
        self.modules = {path for path, _ in model.named_modules()}

    def matches(self, layout: Layout) -> list[str]:
        """Modules that a layout speaks of.

        Raises:
            AnatomyError: One of its globs matches nothing.
        """
        found: dict[str, None] = {}
        for glob in layout.globs:
            steps = glob.split(".")
            fits = [p for p in self.modules if _fits(p.split("."), steps)]
            if not fits:
                raise AnatomyError(
                    f"layouts: no module of {type(self.model).__name__} matches {glob!r} (* is one step of the path); "
                    f"near: {self._near(glob, self.modules)}."
                )
            found.update(dict.fromkeys(sorted(fits, key=natural_of)))
        return list(found)

    def tensor(self, path: str, module: str) -> tuple[str, bool, tuple[int, ...]]:
        """``(canonical name, is it a buffer, shape)`` of a path relative to a module."""
        name = path[1:] if path.startswith("/") else f"{module}.{path}".strip(".")
        if name not in self.known:
            raise AnatomyError(
                f"layouts: {type(self.model).__name__} has no floating parameter or persistent buffer {name!r}; "
                f"near: {self._near(name, self.known)}."
            )
        return self.known[name]

    def counted(self, path: str, module: str) -> list[str]:
        """Paths with a number in the place of ``{unit}``, in order."""
        head, _, tail = path.removeprefix("/").partition("{unit}")
        head = head if path.startswith("/") or not module else f"{module}.{head}"
        number = re.compile(re.escape(head) + r"(\d+)" + re.escape(tail))
        found = {int(m.group(1)): f"/{n}" for n in self.known if (m := number.fullmatch(n))}
        if sorted(found) != list(range(len(found))) or not found:
            raise AnatomyError(
                f"layouts: {path!r} in {module}: the numbers of its units are {sorted(found)}, not 0, 1, …"
            )
        return [found[k] for k in sorted(found)]

    @staticmethod
    def _near(name: str, among: Iterable[str]) -> str:
        return ", ".join(difflib.get_close_matches(name, list(among), n=3, cutoff=0.3)) or "nothing"


def _fits(path: list[str], glob: list[str]) -> bool:
    return len(path) == len(glob) and all(map(fnmatch.fnmatchcase, path, glob))
