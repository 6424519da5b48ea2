"""The data that something was estimated from: moved to the model, cut into examples, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class DataDigest:
    """A fingerprint of batches, in order; a batch counts once, however often it is run."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen = 0

    def add(self, batch: Mapping[str, Any], number: int) -> None:
        """Take in batch ``number``, unless it was there before."""
        if number < self._seen:
            return
        self._seen = number + 1
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, Tensor):
                self._hash.update(f"{name}{value.dtype}{list(value.shape)}".encode())
                plain = value.detach().cpu().contiguous().reshape(-1)
                self._hash.update(plain.view(torch.uint8).numpy().tobytes())

    def hexdigest(self) -> str:
        return f"{self._seen} batches, {self._hash.hexdigest()[:16]}"


def on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch on the device of a model's parameters."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def examples_of(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The rows of a batch, each as a batch of one."""
    for row in range(size):
        yield {
            name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
            for name, value in batch.items()
        }
