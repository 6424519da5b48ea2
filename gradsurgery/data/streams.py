"""Articles one at a time, from the hub or from local files of any size."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gradsurgery.data.article_packing import Source
from gradsurgery.errors import DataError

_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def stream_articles(source: str | Path) -> Source:
    """A function that streams the articles of a source from their beginning, each time it is called.

    Args:
        source: ``"hub:wikimedia/wikipedia:20231101.en"`` (data set and configuration), a ``.jsonl`` file (also ``.gz``,
            ``.bz2``, ``.xz``), a folder of those, or a folder that ``datasets`` wrote with ``save_to_disk``.

    Raises:
        DataError: nothing there; (while reading) no access to the hub, not UTF-8, no JSON.

    Example:
        >>> from gradsurgery.data import stream_articles
        >>> stream_articles("nowhere.jsonl")
        Traceback (most recent call last):
        gradsurgery.errors.DataError: nowhere.jsonl does not exist: give a .jsonl file, a folder, or ...
    """
    if str(source).startswith("hub:"):
        name, _, configuration = str(source).removeprefix("hub:").partition(":")
        return lambda: _hub(name, configuration or None)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist: give a .jsonl file, a folder, or 'hub:owner/name:configuration'.")
    if path.is_dir() and any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return lambda: _saved(path)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if ".jsonl" in p.suffixes)
    if not files:
        raise DataError(f"{path} holds no .jsonl (.gz, .bz2, .xz) and no saved data set.")
    return lambda: (row for file in files for row in _lines(file))


def _hub(name: str, configuration: str | None) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(name, configuration, split="train", streaming=True)
    except Exception as error:  # connection, HTTP and missing data sets all end here
        said = (str(error).splitlines() or ["no message"])[0]
        raise DataError(
            f"{name} cannot be streamed from the hub ({type(error).__name__}: {said}); offline, give local files: "
            f".jsonl with id and text, or a folder written by datasets' save_to_disk."
        ) from error


def _saved(path: Path) -> Iterator[Mapping[str, Any]]:
    import datasets

    loaded = datasets.load_from_disk(str(path))  # mapped from disk
    parts: Iterable[Any] = loaded.values() if isinstance(loaded, Mapping) else [loaded]
    for part in parts:
        yield from part


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with _OPEN.get(path.suffix, open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}, is not UTF-8 ({error.reason}); convert it to UTF-8."
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: no JSON object ({error.msg}); is it truncated?") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
            yield row
