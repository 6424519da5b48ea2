"""Documents from local files: text, JSON lines, plain or compressed, one at a time or a folder of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsurgery.errors import DataError

SEPARATOR = "<|endoftext|>"  # between the documents of a text file, as TinyStories is distributed
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}
_FORMATS = {".txt", ".jsonl"}
_READABLE = "read are .txt and .jsonl, also as .gz, .xz or .bz2"


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its identity. Aligned documents (translations of each other) have the same ``id``."""

    id: str
    text: str


def readable(path: Path) -> bool:
    """Whether the name says that ``read_rows`` can read the file."""
    return _parts(path)[1] in _FORMATS


def stem(path: Path) -> str:
    """The file's name without the endings of format and compression: ``es`` for ``data/es.jsonl.xz``."""
    return _parts(path)[0]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows of one file. A text file gives one ``{"id", "text"}`` for each document: what stands between
    ``<|endoftext|>`` marks where there are any, else between blank lines; ids count from 0, so that files with the
    same number of documents are aligned. Rows of JSON lines without ``id`` get their line's number the same way.

    Raises:
        DataError: the file is missing, empty, truncated, not UTF-8, or of a format that is not read.
    """
    path = Path(path)
    _, suffix, compression = _parts(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file: give a .txt or .jsonl file, a folder of those, or a saved dataset.")
    if suffix not in _FORMATS:
        raise DataError(f"{path} has a format that is not read; {_READABLE}.")
    text = _decode(path, compression)
    rows = list(_text_rows(text) if suffix == ".txt" else _json_rows(text, path))
    if not rows:
        raise DataError(f"{path} is empty: it holds no document.")
    return rows


def _parts(path: Path) -> tuple[str, str, str]:
    name, compression = path.name, ""
    for ending in (".gz", ".xz", ".bz2"):
        if name.endswith(ending):
            name, compression = name[: -len(ending)], ending
    return Path(name).stem, Path(name).suffix, compression


def _decode(path: Path, compression: str) -> str:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        raw = _DECOMPRESS[compression](stored)
    except (EOFError, ValueError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is truncated or damaged: it does not decompress to its end ({error}).") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it to UTF-8.") from error


def _text_rows(text: str) -> Iterator[dict[str, Any]]:
    pieces = text.split(SEPARATOR) if SEPARATOR in text else re.split(r"\n[ \t\r]*\n", text)
    texts = [piece.strip() for piece in pieces]
    yield from ({"id": str(i), "text": text} for i, text in enumerate(text for text in texts if text))


def _json_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number + 1}: no JSON object ({error.msg}); is the file truncated?"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number + 1}: expected a JSON object, got {type(row).__name__}.")
        yield {**row, "id": str(row.get("id", number))}
