"""What lies where in a checkpoint, and which checkpoint of a folder is the last whole one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gradsurgery.errors import ArtefactError
from gradsurgery.files import read_json
from gradsurgery.formats import upgraded

KIND, MANIFEST, TENSORS = "a checkpoint", "checkpoint.json", "tensors"
NAME = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first: what a kill cut off never got its name."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The last whole checkpoint that `save_checkpoint` wrote into a folder, ``None`` where there is none.

    Example:
        >>> print(gs.latest_checkpoint("no/such/folder"))
        None
    """
    return next(reversed(steps_in(Path(folder))), None)


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file but the manifest, by its path in the checkpoint."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, in full length.

    Raises:
        ArtefactError: no checkpoint, or a damaged one.
    """
    path = directory / MANIFEST
    manifest = upgraded(read_json(path, KIND), KIND, path, "load what gs.save_checkpoint wrote")
    there = sizes(directory)
    for name, size in manifest["files"].items():
        if there.get(name) != size:
            found = f"has {there[name]:,} bytes" if name in there else "is missing"
            raise ArtefactError(
                f"{directory / name} {found}, and was written with {size:,}: the checkpoint was damaged after it was "
                f"saved; load an earlier one."
            )
    return manifest
