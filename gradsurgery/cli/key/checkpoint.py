"""Swaps inside safetensors files: the files are copied, and the copies changed in place, mapped into memory.

Nothing is loaded: a checkpoint of any size is keyed at the speed of its copy, and every other bit of it stays.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradsurgery.anatomy import Anatomy
from gradsurgery.errors import ArtefactError
from gradsurgery.files import read_json
from gradsurgery.keys import PermutationKey
from gradsurgery.tensors import Exchange

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A swap moves bits, whatever they mean."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, bytes ``[start, stop)`` there, dtype as safetensors names it, and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; none where it has none.

    Raises:
        ArtefactError: one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX, "the index of a sharded checkpoint").get("weight_map", {}).values()
        files = [folder / name for name in sorted(set(names))]
    else:
        files = [folder / SINGLE] if (folder / SINGLE).is_file() else []
    for file in files:
        if not file.is_file():
            raise ArtefactError(f"{file} is missing; the index of {folder} names it.")
    return files


def tensors_in(file: Path) -> dict[str, Stored]:
    """The header of a safetensors file.

    Raises:
        ArtefactError: truncated, or no such file.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length if length < size else 0))
        out = {}
        for name, about in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in about["data_offsets"])
                out[name] = Stored(file, about["dtype"], tuple(about["shape"]), start, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{file} is truncated or no safetensors file.") from error
    if any(one.stop > size for one in out.values()):
        raise ArtefactError(f"{file} is truncated: it ends before its last tensor.")
    return out


def exchange_files(
    files: Sequence[Path], staging: Path, key: PermutationKey, anatomy: Anatomy, model: nn.Module
) -> bool:
    """Copy the files into ``staging`` and swap there; False, with nothing done, where the names are not the model's."""
    stored = {name: one for file in files for name, one in tensors_in(file).items()}
    plan = key.plan(anatomy)
    exchanges = [exchange for exchange in (plan.weights, plan.buffers) if exchange.swaps]
    found = {name: match(name, anatomy, model, stored) for one in exchanges for name in one.names}
    if converted_by_transformers(model) or not fits(exchanges, found):
        return False
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="copy", disable=None, file=sys.stderr) as bar:
        for file in files:
            shutil.copyfile(file, staging / file.name)
            bar.update(file.stat().st_size)
    if (index := files[0].parent / INDEX).is_file():
        shutil.copyfile(index, staging / INDEX)
    mapped = {file.name: mapping(staging / file.name) for file in {one.file for one in found.values() if one}}
    tensors = {name: view(mapped[one.file.name], one) for name, one in found.items() if one}
    for exchange in exchanges:
        exchange(tensors)
    return True


def match(name: str, anatomy: Anatomy, model: nn.Module, stored: Mapping[str, Stored]) -> Stored | None:
    """The stored tensor of a parameter: under one of its names, with or without the prefix of the base model."""
    names = [name, *(other for other, first in anatomy.space.aliases.items() if first == name)]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for one in [*names, *(prefix + n for n in names), *(n.removeprefix(prefix) for n in names)]:
        if one in stored:
            return stored[one] if stored[one].shape == _shape(name, model) else None
    return None


def _shape(name: str, model: nn.Module) -> tuple[int, ...]:
    owner, _, leaf = name.rpartition(".")
    return tuple(getattr(model.get_submodule(owner), leaf).shape)


def fits(exchanges: Sequence[Exchange], found: Mapping[str, Stored | None]) -> bool:
    """Whether all tensors are there, as whole words, and both ends of every swap of one dtype."""
    for one in found.values():
        if one is None or _word(one) not in WORDS or one.start % _word(one):
            return False
    ends = [(found[swap.a.name], found[swap.b.name]) for exchange in exchanges for swap in exchange.swaps]
    return all(a is not None and b is not None and a.dtype == b.dtype for a, b in ends)


def _word(one: Stored) -> float:
    return (one.stop - one.start) / max(torch.Size(one.shape).numel(), 1)


def mapping(file: Path) -> Tensor:
    """The bytes of a file; what is written into them is written into the file."""
    return torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8)


def view(whole: Tensor, one: Stored) -> Tensor:
    return whole[one.start : one.stop].view(WORDS[int(_word(one))]).view(one.shape)


def converted_by_transformers(model: Any) -> bool:
    """Whether ``from_pretrained`` computes weights out of the stored ones (fused experts, reordered rotary rows)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return True  # not known, so take the way that asks transformers for the weights
    return any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model))
