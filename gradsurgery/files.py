"""Files that appear whole or not at all: written beside, flushed, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradsurgery.errors import ArtefactError


@contextlib.contextmanager
def atomic_path(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends without an exception.

    Args:
        path: The file.
        mode: Its permissions; by default what ``open`` would give.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        os.chmod(beside, 0o666 & ~_umask() if mode is None else mode)  # mkstemp gives 0600, which open() would not
        yield beside
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, private: bool = False) -> Iterator[Path]:
    """A folder beside ``path`` that becomes it when the block ends without an exception, else disappears.

    Args:
        path: The folder: not there yet, or empty.
        private: For its owner alone; by default what ``mkdir`` would give.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield beside
        for part in beside.rglob("*"):
            if part.is_file():
                with open(part, "rb") as written:
                    os.fsync(written.fileno())
        if not private:  # mkdtemp gives 0700
            beside.chmod(0o777 & ~_umask())
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read JSON; a missing or truncated file is an ``ArtefactError`` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path} does not exist; expected {what} there.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is truncated or no JSON ({error}); expected {what} there.") from None
