"""Orthonormal bases for weights: directions of their inputs (or outputs), one basis for all that read one input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import Names
from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.errors import PlanError, SelectionError
from gradsurgery.estimators.matrices import Layout

Side = Literal["input", "output"]
ENERGIES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Site:
    """A weight that a basis speaks of.

    Attributes:
        layout: How it is a matrix.
        key: Which of the bases is its own; projections that read one input share one.
    """

    layout: Layout
    key: str


@dataclass(frozen=True, eq=False)
class Basis:
    """For every weight ``W [out, in]`` an orthonormal basis ``U [in, k]`` of its inputs, ``W~ = W U``; or, for ``side=
    "output"``, ``V [out, k]`` of its outputs, ``W~ = V^T W``. Made by `activation_basis`.

    Attributes:
        space: Names and shapes of the model's parameters.
        side: ``"input"`` or ``"output"``.
        sites: By parameter name.
        vectors: By key ``[…, n, k]``, columns of falling eigenvalue; ``None`` is the identity.
        values: By key ``[…, n]``: all eigenvalues, the mean square of a row along each direction.
        counts: By key, how many rows were seen.
        about: What it was made from: options, fingerprint of the data, dtype of the model.
    """

    space: ParameterSpace
    side: Side
    sites: Mapping[str, Site]
    vectors: Mapping[str, Tensor | None]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Any:
        return iter(self.sites)

    def canonical(self, name: str) -> str:
        """The parameter name of a weight, given that, a tied name, or its layer's.

        Raises:
            SelectionError: the basis does not speak of it.
        """
        for given in (name, f"{name}.weight"):
            if (own := self.space.aliases.get(given, given)) in self.sites:
                return own
        raise SelectionError(f"the basis speaks of {len(self)} weights of {self.space.model}, and not of {name!r}.")

    def site(self, name: str) -> Site:
        """Layout and key of a weight."""
        return self.sites[self.canonical(name)]

    def __getitem__(self, name: str) -> Tensor:
        """``[…, n, k]``: the vectors for one weight."""
        site = self.site(name)
        found = self.vectors[site.key]
        return torch.eye(self.width(name)) if found is None else found

    def sizes(self, name: str) -> tuple[int, ...]:
        """``([stack,] out, in)`` of one weight."""
        return self.site(name).layout.sizes(self.space.shapes[self.canonical(name)])

    def width(self, name: str) -> int:
        """``n``: the dimension that the basis is of."""
        return self.sizes(name)[-1 if self.side == "input" else -2]

    def rotated_shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``W~``: ``([stack,] out, k)``, at the output side ``([stack,] k, in)``."""
        sizes, found = self.sizes(name), self.vectors[self.site(name).key]
        k = self.width(name) if found is None else found.shape[-1]
        return (*sizes[:-1], k) if self.side == "input" else (*sizes[:-2], k, sizes[-1])

    @cached_property
    def region(self) -> Region:
        """The weights that the basis speaks of."""
        return Region(self.space, {name: Entries.full(self.space.shapes[name]) for name in self.sites})

    @cached_property
    def rest(self) -> Region:
        """Every other parameter; with a text, since naming a region by its entries takes long where it is large."""
        rest = Region.whole(self.space) - self.region
        return Region(self.space, rest.entries, f"weights without basis {self.digest}")

    def rank(self, name: str, energy: float) -> int:
        """How many directions hold this share of the mean square; of stacks the most."""
        values = self._values(self.site(name).key).double()
        total = values.sum(-1, keepdim=True)
        reached = values.cumsum(-1) < energy * total * (1 - 1e-12)
        return int((reached.sum(-1) + 1).clamp(max=values.shape[-1]).where(total.squeeze(-1) > 0, 0).max())

    def _values(self, key: str) -> Tensor:
        if key not in self.values:
            raise PlanError("this basis has no spectrum: it was not made from activations.")
        return self.values[key]

    def top(self, k: int | None = None, energy: float | None = None) -> Basis:
        """The leading directions alone, in factored form ``[n, k]``.

        Args:
            k: How many of every basis (all, where there are fewer).
            energy: Or: as many as hold this share of the mean square; at least one.

        Raises:
            PlanError: both or neither, or out of range; more energy than the kept directions hold.
        """
        if (k is None) == (energy is None):
            raise PlanError("top takes a number of directions or a share of the energy: one of the two.")
        if k is not None and (type(k) is not int or k < 1):
            raise PlanError(f"top: k is a positive number of directions, not {k!r}.")
        if energy is not None and not 0 < energy <= 1:
            raise PlanError(f"top: energy is a share above 0 and up to 1, not {energy!r}.")
        out: dict[str, Tensor | None] = {}
        for name, site in self.sites.items():
            if site.key in out:
                continue
            vectors = self[name]
            wanted = max(self.rank(name, energy), 1) if energy is not None else k
            assert wanted is not None
            if energy is not None and wanted > vectors.shape[-1]:
                raise PlanError(
                    f"{100 * energy:g}% of the energy of {name} takes {wanted} directions, and this basis keeps "
                    f"{vectors.shape[-1]}; make it with a larger top_k."
                )
            out[site.key] = vectors[..., :wanted].contiguous()
        kept = {"k": k} if k is not None else {"energy": energy}
        return Basis(self.space, self.side, self.sites, out, self.values, self.counts, {**self.about, "kept": kept})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Basis:
        """The same basis elsewhere, or stored in fewer bits (bf16: orthonormal to 4e-3)."""
        moved = {k: v.to(device=device, dtype=dtype) if v is not None else None for k, v in self.vectors.items()}
        return Basis(self.space, self.side, self.sites, moved, self.values, self.counts, self.about)

    @cached_property
    def digest(self) -> str:
        """16 hex digits of where the basis came from and of its vectors: masks made in another one do not fit."""
        keys = {name: [site.key, list(self.rotated_shape(name))] for name, site in self.sites.items()}
        about = {k: v for k, v in self.about.items() if k != "gradsurgery"}
        text = json.dumps([self.space.fingerprint, self.side, keys, about], sort_keys=True, default=str)
        out = hashlib.sha256(text.encode())
        for vectors in self.vectors.values():
            if vectors is not None:
                flat = vectors.detach().reshape(-1)
                sample = flat[:: max(flat.numel() // 65536, 1)].float().cpu().contiguous()
                out.update(sample.view(torch.uint8).numpy().tobytes())
        return out.hexdigest()[:16]

    def spectrum(self, name: str) -> Tensor:
        """``[…, n]``: eigenvalues of the inputs (outputs) of a weight, falling."""
        return self._values(self.site(name).key)

    def table(self) -> list[dict[str, Any]]:
        """One row a basis: who shares it, width, kept directions, rows seen, rank at 50, 90 and 99% of the energy."""
        rows = []
        for key in self.vectors:
            names = [name for name, site in self.sites.items() if site.key == key]
            row: dict[str, Any] = {"weights": ", ".join(names), "width": self.width(names[0])}
            row["kept"] = self.rotated_shape(names[0])[-1 if self.side == "input" else -2]
            if key in self.values:
                row["rows"] = int(self.counts[key].sum())
                row |= {f"rank {100 * energy:g}%": self.rank(names[0], energy) for energy in ENERGIES}
            rows.append(row)
        return rows

    def __repr__(self) -> str:
        bytes_ = sum(v.nbytes for v in self.vectors.values() if v is not None)
        return (
            f"Basis({self.side}s of {len(self)} weights of {self.space.model}: {len(self.vectors)} bases, "
            f"{bytes_ / 2**20:.1f} MiB)"
        )

    def save(self, path: str | Path) -> None:
        """Write the basis as safetensors with a manifest in its header; the file appears whole or not at all."""
        from gradsurgery.estimators.artefacts import save_basis

        save_basis(self, path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None, any_dtype: bool = False) -> Basis:
        """Read what `save` wrote.

        Args:
            path: The file.
            model: The model it is for; must be the one that it was made for.
            any_dtype: Take a basis that was made while the model was in another dtype.

        Raises:
            ArtefactError: missing, damaged, or made for another model or dtype; the message says what differs.
        """
        from gradsurgery.estimators.artefacts import load_basis

        return load_basis(path, model, any_dtype)


def identity_basis(model: nn.Module, modules: Names | Region = "all-linear") -> Basis:
    """The original coordinates as a basis, ``W~ = W``: what rotation is compared with. Holds no tensors.

    Args:
        model: The model.
        modules: As in `activation_basis`.

    Example:
        >>> plain = gs.estimators.identity_basis(model, "down_proj")
        >>> len(plain), plain.vectors["model.layers.0.mlp.down_proj.weight"]
        (2, None)
    """
    from gradsurgery.estimators.targets import targets_of

    base = unwrap(model)
    found = targets_of(base, modules, "identity_basis")
    sites = {}
    for target in found:
        layout = target.layout or Layout("experts")  # an entry is an entry, whichever side of it is the input
        sites[target.name] = Site(layout, target.name)
    about = {"basis": "identity", "dtype": dtype_of(base, list(sites))}
    return Basis(ParameterSpace.of(base), "input", sites, dict.fromkeys(sites), about=about)


def dtype_of(model: nn.Module, names: list[str]) -> str:
    """The dtypes of some weights, as text."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return " and ".join(sorted({str(own[name].dtype).removeprefix("torch.") for name in names if name in own}))
