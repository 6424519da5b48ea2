"""Selection of whole parameters by name: exact, suffix, glob, regular expression, ``"all-linear"``."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.errors import SelectionError

Names = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]


def region(model: nn.Module, names: Names, *, exclude: Names | None = None) -> Region:
    """All entries of the parameters whose names match.

    A pattern is an exact parameter or module name (``"model.layers.0.mlp"``), a suffix of one (``"q_proj"``), a glob
    (``"model.layers.*.mlp.*"``), a regular expression that matches in full (a compiled one, or a string that is no name
    and no glob, such as ``r"model\\.layers\\.(0|1)\\..*"``), or ``"all-linear"``: the weights and biases of every
    linear-like module but the output head, as in PEFT. Several patterns are alternatives. Tied weights are seen once,
    under either name.

    Args:
        model: Any module.
        names: Pattern or patterns.
        exclude: Patterns to leave out again.

    Raises:
        SelectionError: a pattern matches nothing; the message names the nearest parameters.

    Example:
        >>> import torch, gradsurgery as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> gs.region(model, "*.bias", exclude="1.*").parameters()
        ('0.bias',)
    """
    model = unwrap(model)
    return select_names(ParameterSpace.of(model), names, exclude, _linear_names(model))


def select_names(
    space: ParameterSpace, names: Names, exclude: Names | None = None, linear: Iterable[str] = ()
) -> Region:
    """The region of the parameters of ``space`` that match ``names`` and not ``exclude``."""
    chosen = dict.fromkeys(n for pattern in _several(names) for n in _match(space, pattern, linear))
    for pattern in _several(exclude) if exclude is not None else ():
        for name in _match(space, pattern, linear):
            chosen.pop(name, None)
    if not chosen:
        raise SelectionError(f"{names!r} without {exclude!r} leaves no parameter of {space.model}.")
    shown = [p if isinstance(p, str) else p.pattern for p in _several(names)]
    text = "" if exclude is not None or "all-linear" in shown else " | ".join(f"region({p!r})" for p in shown)
    return Region(space, {name: Entries.full(space.shapes[name]) for name in chosen}, text)


def _several(names: Names) -> Sequence[str | re.Pattern[str]]:
    return [names] if isinstance(names, str | re.Pattern) else list(names)


def _match(space: ParameterSpace, pattern: str | re.Pattern[str], linear: Iterable[str]) -> list[str]:
    everything = [*space.shapes, *space.aliases]
    if pattern == "all-linear":
        found = list(linear)
    elif isinstance(pattern, re.Pattern):
        found = [name for name in everything if pattern.fullmatch(name)]
    else:
        found = [n for n in everything if n == pattern or n.startswith(pattern + ".")]
        found = found or [n for n in everything if f".{n}.".find(f".{pattern}.") >= 0]
        found = found or [n for n in everything if fnmatch.fnmatchcase(n, pattern)]
        found = found or [n for n in everything if _fullmatch(pattern, n)]
    if not found:
        near = difflib.get_close_matches(str(pattern), everything, n=3, cutoff=0.3) or everything[:3]
        raise SelectionError(f"{pattern!r} matches no parameter of {space.model}; near names: {', '.join(near)}.")
    return [space.canonical(name) for name in found]


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _linear_names(model: nn.Module) -> list[str]:
    """Parameters of linear-like leaves (2-D ``weight`` applied to features), without embeddings and the output head."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    out = []
    for path, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and module is not head:
            out += [f"{path}.{n}" if path else n for n, _ in module.named_parameters(recurse=False)]
    return out
