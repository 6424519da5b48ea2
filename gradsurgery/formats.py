"""Formats of what the library writes: which ones it reads, and how an older one becomes the present one.

A format's number changes when what was written before could no longer be read as it is, and with it comes an upgrade: a
function from the old data to the next format's. So every artefact stays readable by every later version, and one of a
newer version says which version to install.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradsurgery.errors import ArtefactError
from gradsurgery.version import __version__

Data = dict[str, Any]

CURRENT = {
    "an anatomy": 1,
    "a permutation key": 1,
    "a basis": 1,
    "importances": 1,
    "masks": 1,
    "a direction": 1,
    "a gradient memory": 1,
    "an adapter": 1,
    "precomputed log-probabilities": 1,
    "prepared articles": 1,
    "what a checkpoint says of its keys": 1,
    "the state of a surgery": 1,
    "a checkpoint": 1,
    "what a method did": 1,
}
"""Number of the format by kind of artefact."""

UPGRADES: dict[tuple[str, int], Callable[[Data], Data]] = {}
"""By kind and number, what turns that format's data into the next one's."""


def stamp(kind: str, name: str = "gradsurgery") -> Data:
    """What every artefact says of itself: its format, and, under ``name``, the version that wrote it."""
    return {"format": CURRENT[kind], name: __version__}


def upgraded(data: Any, kind: str, path: str | Path, again: str = "make it again", before: int | None = None) -> Data:
    """Stored data in the present format.

    Args:
        data: What was read.
        kind: What it should be.
        path: Where it was read, for messages.
        again: The way out where it is none.
        before: The format of data that say none, where such were written once.

    Raises:
        ArtefactError: no such artefact, or one of a newer version.
    """
    known = CURRENT[kind]
    number = data.get("format", before) if isinstance(data, Mapping) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ArtefactError(f"{path} is not {kind} of format {known}; {again}.")
    if number > known:
        writer = data.get("gradsurgery", data.get("version", "a newer version"))
        raise ArtefactError(
            f"{path} was written in format {number} by gradsurgery {writer}, and {__version__} reads {kind} up to "
            f"format {known}: pip install --upgrade gradsurgery."
        )
    out = dict(data)
    for step in range(number, known):
        out = {**UPGRADES[kind, step](out), "format": step + 1}
    return out
