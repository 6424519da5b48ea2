"""Bases, importances and masks on disk: one safetensors file, with a manifest in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import ArtefactError
from gradsurgery.estimators.basis import Basis, Site, dtype_of
from gradsurgery.estimators.matrices import Layout
from gradsurgery.files import atomic_path
from gradsurgery.formats import stamp, upgraded

_HEADER = "gradsurgery"


def write(path: str | Path, kind: str, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write tensors and a manifest as one file, whole or not at all.

    Raises:
        ArtefactError: the disk is full or the path cannot be written.
    """
    path = Path(path)
    header = {**stamp(kind), "kind": kind, **manifest}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as beside:
            save_file(plain, beside, metadata={_HEADER: json.dumps(header)})
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} could not be written ({error}); nothing is left.") from error


def read_manifest(path: str | Path, kind: str) -> dict[str, Any]:
    """What a file was made for, without its tensors."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {}).get(_HEADER, "null"))
    except FileNotFoundError:
        raise ArtefactError(f"{path} does not exist; expected {kind} there.") from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{path} is truncated or no safetensors file ({error}); expected {kind} there.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        have = manifest.get("kind", "another file") if isinstance(manifest, dict) else "no artefact of gradsurgery"
        raise ArtefactError(f"{path} holds {have}; expected {kind}.")
    return upgraded(manifest, kind, path)


def read(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a file.

    Raises:
        ArtefactError: missing, truncated, or of another kind.
    """
    manifest = read_manifest(path, kind)
    try:
        with safe_open(Path(path), framework="pt") as file:
            return manifest, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} is truncated ({error}); make it again.") from None


def save_basis(basis: Basis, path: str | Path) -> None:
    """See `Basis.save`."""
    tensors = {f"vectors/{key}": found for key, found in basis.vectors.items() if found is not None}
    tensors |= {f"values/{key}": found for key, found in basis.values.items()}
    tensors |= {f"counts/{key}": found for key, found in basis.counts.items()}
    space = basis.space
    manifest = {
        "model": space.model,
        "fingerprint": space.fingerprint,
        "shapes": {name: list(shape) for name, shape in space.shapes.items()},
        "aliases": space.aliases,
        "layout": space.layout,
        "side": basis.side,
        "keys": list(basis.vectors),
        "sites": {
            name: {
                "key": site.key,
                "kind": site.layout.kind,
                "transposed": site.layout.transposed,
                "groups": site.layout.groups,
                "rotated": list(basis.rotated_shape(name)),
            }
            for name, site in basis.sites.items()
        },
        "about": dict(basis.about),
        "digest": basis.digest,
    }
    write(path, "a basis", tensors, manifest)


def load_basis(path: str | Path, model: nn.Module | None = None, any_dtype: bool = False) -> Basis:
    """See `Basis.load`."""
    manifest, tensors = read(path, "a basis")
    try:
        shapes = {name: tuple(map(int, shape)) for name, shape in manifest["shapes"].items()}
        space = ParameterSpace(manifest["model"], shapes, manifest["aliases"], manifest["layout"])
        sites = {
            name: Site(Layout(site["kind"], bool(site["transposed"]), int(site["groups"])), site["key"])
            for name, site in manifest["sites"].items()
        }
        parts: dict[str, dict[str, Tensor]] = {"vectors": {}, "values": {}, "counts": {}}
        for name, tensor in tensors.items():
            kind, key = name.split("/", 1)
            parts[kind][key] = tensor
        vectors = {key: parts["vectors"].get(key) for key in manifest["keys"]}
        basis = Basis(space, manifest["side"], sites, vectors, parts["values"], parts["counts"], manifest["about"])
        whole = all(list(basis.rotated_shape(name)) == manifest["sites"][name]["rotated"] for name in sites)
        digest = basis.digest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{path} is damaged ({error!r}); make the basis again.") from error
    if not whole or digest != manifest["digest"]:
        raise ArtefactError(f"{path} is damaged: its vectors are not those of its manifest; make the basis again.")
    if model is not None:
        require_model(basis, model, f"{path}: the basis", any_dtype)
    return basis


def require_model(basis: Basis, model: nn.Module, what: str, any_dtype: bool = False) -> None:
    """Raise an ``ArtefactError`` that says what differs, unless a basis was made for this model."""
    here = ParameterSpace.of(model)
    if gap := basis.space.difference(here):
        raise ArtefactError(f"{what} fits another model: {gap}.")
    made, own = basis.about.get("dtype"), dtype_of(model, list(basis.sites))
    if not any_dtype and made is not None and made != own:
        raise ArtefactError(
            f"{what} was made while the weights were {made}, and they are {own} here; any_dtype=True takes it all the "
            f"same."
        )


def require_basis(made_in: str, basis: Basis, what: str) -> None:
    """Raise unless ``what`` was made in this very basis."""
    if made_in != basis.digest:
        raise ArtefactError(
            f"{what} belongs to another basis ({made_in}; this one is {basis.digest}: {basis!r} from "
            f"{basis.about.get('data', 'no data')}). Estimate it again in this basis, or load the basis it was made in."
        )
