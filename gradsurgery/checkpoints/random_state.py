"""The random state of a rank: torch's generators, Python's and numpy's, as JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """Of this process, all generators that a training step may draw from."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": packed(torch.get_rng_state()),
        "python": [version, list(numbers), gauss],
        "numpy": [name, [int(k) for k in keys], position, has_gauss, cached],  # type: ignore[union-attr]
    }
    if torch.cuda.is_available():
        state["cuda"] = packed(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any], fork: int = 0) -> None:
    """Go on drawing where ``state`` was taken; with ``fork`` from a stream of its own, drawn from there.

    Args:
        state: Of `random_state`.
        fork: Number of the stream: ranks that the saved run did not have must not draw what another one does.
    """
    if fork:
        generator = torch.Generator()
        generator.set_state(unpacked(state["torch"]))
        seed = int(torch.randint(2**62, (fork,), generator=generator)[-1])
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        return
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(unpacked(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(unpacked(state["cuda"]))


def packed(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
