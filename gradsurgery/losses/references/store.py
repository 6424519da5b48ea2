"""Precomputed log-probabilities on disk: safetensors shards, and an index of which row lies where.

A folder with ``index.json`` (what it was made with), ``rows.safetensors`` (by row its number, hash, shard, start and
length) and ``shard-00000.safetensors``, … (by counted position the log-probabilities). It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradsurgery.errors import ArtefactError, BatchError
from gradsurgery.files import atomic_path, read_json, write_json
from gradsurgery.formats import stamp, upgraded

KIND = "precomputed log-probabilities"
INDEX, ROWS = "index.json", "rows.safetensors"


def row_hashes(inputs: Mapping[str, Any], counted: Tensor, decoder: bool, numbered: bool) -> list[bytes]:
    """16 bytes by row, of the ids that it is read from: where and how much a row is padded makes no difference.

    Args:
        counted: The positions of the logits that count, ``[batch, token]``.
        decoder: They are a decoder's, after an encoder.
        numbered: Rows have numbers, and the hash is only to tell when their ids change.
    """
    attended = inputs.get("attention_mask")
    own = {"decoder_input_ids": counted, "labels": counted} if decoder else {}
    masks = {"input_ids": attended, "token_type_ids": attended, **own}
    parts = [(inputs[name], mask) for name, mask in masks.items() if isinstance(inputs.get(name), Tensor)]
    floats = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point() and "mask" not in k]
    if not numbered and (floats or not parts):
        have = f"{floats[0]} besides ids" if floats and parts else f"only {', '.join(map(str, inputs)) or 'nothing'}"
        raise BatchError(
            f"rows are known by their ids alone, and these inputs have {have}; give every batch a column of row "
            f"numbers and precompute with ids='…'."
        )
    out = []
    for row in range(counted.shape[0]):
        digest = hashlib.blake2b(digest_size=16)
        for ids, mask in parts:
            kept = ids[row] if mask is None or mask.shape != ids.shape else ids[row][mask[row].to(ids.device) != 0]
            digest.update(len(kept).to_bytes(8, "little") + kept.to("cpu", torch.int64).numpy().tobytes())
        out.append(digest.digest())
    return out


@contextmanager
def whole_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``path`` that becomes it when the block ends; nothing is left behind if it does not."""
    if path.exists() and not (overwrite and (path / INDEX).is_file()):
        out = "pass overwrite=True to replace it" if (path / INDEX).is_file() else "it holds something else"
        raise ArtefactError(f"{path} exists; choose another path ({out}).")
    beside = path.parent / f".{path.name}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(path, ignore_errors=True)
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class Writer:
    """Writes rows into shards of about ``shard_size`` bytes."""

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder, self.shard_size = folder, shard_size
        self._pending: list[dict[str, Tensor]] = []
        self._bytes = self._start = self._shard = 0
        self._rows: list[tuple[int, int, int, int]] = []
        self._hashes: list[bytes] = []

    def add(self, key: int, hashed: bytes, values: dict[str, Tensor]) -> None:
        length = next(iter(values.values())).shape[0]
        self._rows.append((key, self._shard, self._start, length))
        self._hashes.append(hashed)
        self._pending.append(values)
        self._start += length
        self._bytes += sum(value.nbytes for value in values.values())
        if self._bytes >= self.shard_size:
            self._flush()

    def _flush(self) -> None:
        tensors = {name: torch.cat([values[name] for values in self._pending]) for name in self._pending[0]}
        self._save(shard_name(self._shard), tensors)
        self._pending, self._bytes, self._start = [], 0, 0
        self._shard += 1

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        try:
            with atomic_path(self.folder / name) as beside:
                save_file(tensors, beside)
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{self.folder.parent} could not be written to ({error}); nothing is left.") from error

    def finish(self, about: Mapping[str, Any]) -> None:
        if self._pending:
            self._flush()
        hashes = torch.from_numpy(np.frombuffer(b"".join(self._hashes), dtype=np.uint8).reshape(-1, 16).copy())
        self._save(ROWS, {"rows": torch.tensor(self._rows, dtype=torch.int64).view(-1, 4), "hashes": hashes})
        header = {**stamp(KIND), **about, "rows": len(self._rows), "shards": self._shard}
        write_json(self.folder / INDEX, header)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


class Reader:
    """Rows of a stored folder; shards are mapped into memory, not read as a whole.

    Raises:
        ArtefactError: no such folder, or one that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = upgraded(read_json(path / INDEX, KIND), KIND, path / INDEX, "precompute again")
        try:
            stored = load_file(path / ROWS)
            rows, hashes = stored["rows"].tolist(), stored["hashes"].numpy()
            complete = len(rows) == len(hashes) == self.about["rows"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ArtefactError(f"{path / ROWS} is missing or damaged ({error}); precompute again.") from None
        if not complete:
            raise ArtefactError(f"{path} holds {len(rows)} rows of {self.about['rows']}; precompute again.")
        self.hashes = [row.tobytes() for row in hashes]
        self.rows: list[list[int]] = rows
        self.by_key = {row[0]: number for number, row in enumerate(rows)}
        self.by_hash = {hashed: number for number, hashed in enumerate(self.hashes)}
        self._shards: dict[int, Any] = {}

    def read(self, number: int, names: Sequence[str]) -> list[Tensor]:
        """Stored tensors of one row, ``[position, …]``."""
        _, shard, start, length = self.rows[number]
        path = self.path / shard_name(shard)
        try:
            if shard not in self._shards:
                self._shards[shard] = safe_open(path, framework="pt")
            return [self._shards[shard].get_slice(name)[start : start + length] for name in names]
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{path} is missing or damaged ({error}); precompute again.") from None
