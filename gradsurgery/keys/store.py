"""Key files: JSON as the originals write it, plus what model a key was made for; readable by their owner only."""

from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsurgery.errors import ArtefactError, KeyWarning
from gradsurgery.files import atomic_path, read_json
from gradsurgery.formats import stamp, upgraded
from gradsurgery.keys.lists import LISTS

if TYPE_CHECKING:
    from gradsurgery.keys.key import PermutationKey

KIND = "a permutation key"
HALVES = ("experts", "attn_out_heads", "mlp_up_cols", "mlp_down_cols")
"""Lists that a file leaves out where they are empty."""
ABOUT = "gradsurgery"


def save(key: PermutationKey, path: Path) -> None:
    """Write a key; without metadata the file is the originals', list for list."""
    _ = key.fingerprint  # raises for what is no key
    data: dict[str, Any] = {name: getattr(key, name) for name in LISTS if name not in HALVES or getattr(key, name)}
    if key.model is not None:
        data[ABOUT] = {**stamp(KIND, "version"), "model": key.model, "key": key.fingerprint}
    with atomic_path(path, mode=stat.S_IRUSR | stat.S_IWUSR) as beside:
        beside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """The lists of a key file, and ``model`` where it says so.

    Raises:
        ArtefactError: missing, truncated, no key, lists of another format, or swaps that were changed since.
    """
    path = path.expanduser()
    data = read_json(path, KIND)
    if not isinstance(data, dict) or not any(name in data for name in LISTS):
        raise ArtefactError(f"{path} is no permutation key: it has none of the lists {', '.join(LISTS)}.")
    about = data.pop(ABOUT, {})
    if unknown := sorted(set(data) - set(LISTS)):
        raise ArtefactError(f"{path} holds {', '.join(unknown)}, which this version does not know: {', '.join(LISTS)}.")
    about = upgraded(about, KIND, path, before=1)  # the originals' files say nothing of themselves
    warn_of_readers(path)
    out = {**{name: swaps for name, swaps in data.items() if swaps is not None}, "model": about.get("model")}
    if (made := about.get("key")) is not None:
        from gradsurgery.keys.key import PermutationKey

        if (now := PermutationKey(**out).fingerprint) != made:
            raise ArtefactError(f"{path} was written as key {made} and now holds {now}: its swaps were changed.")
    return out


def warn_of_readers(path: Path) -> None:
    """Say that others than the owner may read a key (where the system has such permissions)."""
    if os.name == "posix" and (others := path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)):
        warnings.warn(
            f"{path} can be read by others than its owner (mode {others:03o}): chmod 600 {path}",
            KeyWarning,
            stacklevel=4,
        )
