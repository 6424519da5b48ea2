"""A direction in the coordinates of an adapter: what it is made of, where it is weak, on disk."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import ArtefactError
from gradsurgery.estimators.artefacts import read, write

KIND = "a direction"


@dataclass(frozen=True, eq=False)
class Direction:
    """Orthonormal axes by layer, strongest first; gradients along them are those of what is not wanted.

    Attributes:
        axes: By layer, ``[k, coordinates]``; axes below the noise floor are zero.
        values: By layer, the singular values ``[k]``.
        agreement: By layer, the mean cosine of a pair's difference with the first axis of the other pairs.
        floor: By layer, what random directions reach in 95 of 100 draws.
        fingerprint: The adapter's.
        about: Number of pairs, loss, data.
    """

    axes: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    agreement: Mapping[str, float]
    floor: Mapping[str, float]
    fingerprint: str
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def coordinates(self) -> dict[str, int]:
        return {path: axes.shape[1] for path, axes in self.axes.items()}

    @functools.cached_property
    def stacked(self) -> Tensor:
        """The first axis of every layer, one after the other."""
        return torch.cat([axes[0] for axes in self.axes.values()])

    @property
    def beats_noise(self) -> dict[str, bool]:
        """By layer, whether pairs agree more than a random direction would have them."""
        return {path: self.agreement[path] > self.floor[path] for path in self.axes}

    def require_nonzero(self, what: str) -> None:
        if not bool(self.stacked.any()):
            raise ArtefactError(f"{what}: the direction is zero in every layer; nothing can be compared with it.")
        if not bool(torch.isfinite(self.stacked).all()):
            raise ArtefactError(f"{what}: the direction holds nan or inf; estimate it again.")

    def overlap(self, other: Direction) -> float:
        """Mean ``|cos|`` of the first axes where both are not zero: near 1 after a refresh, if all is well."""
        pairs = [
            (axes[0].double(), other.axes[path][0].double()) for path, axes in self.axes.items() if path in other.axes
        ]
        found = [abs(float(a @ b.to(a))) for a, b in pairs if bool(a.any()) and bool(b.any())]
        return sum(found) / len(found) if found else 0.0

    def random(self, seed: int = 0) -> Direction:
        """A direction of the same shape drawn at random: the control that every result needs beside it."""
        generator = torch.Generator().manual_seed(seed)
        axes = {}
        for path, own in self.axes.items():
            drawn = torch.randn(own.shape[1], own.shape[0], generator=generator, dtype=torch.float64)
            axes[path] = torch.linalg.qr(drawn)[0].T.contiguous().to(own)
        zeros = dict.fromkeys(self.axes, 0.0)
        about = {"random": seed}
        return Direction(axes, self.values, zeros, self.floor, self.fingerprint, about)

    def describe(self) -> str:
        if "random" in self.about:
            return f"random direction {self.about['random']}"
        beats = sum(self.beats_noise.values())
        return f"direction of {self.about.get('pairs', '?')} pairs, above noise in {beats} of {len(self.axes)} layers"

    def __repr__(self) -> str:
        return f"Direction({self.describe()})"

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f"axes/{name}": x for name, x in self.axes.items()}
        tensors |= {f"values/{name}": x for name, x in self.values.items()}
        manifest = {
            "fingerprint": self.fingerprint,
            "layers": list(self.axes),
            "agreement": dict(self.agreement),
            "floor": dict(self.floor),
            "about": dict(self.about),
        }
        write(path, KIND, tensors, manifest)

    @classmethod
    def load(cls, path: str | Path, adapter: Any = None) -> Direction:
        """Read a direction; with an adapter, one that is of its coordinates.

        Raises:
            ArtefactError: missing, damaged, or made for another adapter or model.
        """
        manifest, tensors = read(path, KIND)
        try:
            axes = {name: tensors[f"axes/{name}"] for name in manifest["layers"]}
            values = {name: tensors[f"values/{name}"] for name in manifest["layers"]}
            found = cls(
                axes, values, manifest["agreement"], manifest["floor"], manifest["fingerprint"], manifest["about"]
            )
            whole = all(x.dim() == 2 and len(x) == len(values[name]) for name, x in axes.items()) and bool(axes)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{path} is damaged ({error!r}); estimate the direction again.") from error
        if not whole:
            raise ArtefactError(f"{path} is damaged: its axes and values do not go together.")
        if adapter is not None:
            adapter.require_direction(found.fingerprint, found.coordinates, f"{path}: the direction")
        return found
