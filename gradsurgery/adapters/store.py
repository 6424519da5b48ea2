"""Adapters on disk: one safetensors file with a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradsurgery.adapters.adapter import Adapter
from gradsurgery.adapters.add import add
from gradsurgery.anatomy.select import region
from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.errors import ArtefactError
from gradsurgery.estimators.artefacts import read, write
from gradsurgery.tensors import is_sharded

KIND = "an adapter"


def save(adapter: Adapter, path: str | Path) -> None:
    """See `Adapter.save`; every rank calls it, and the first one writes."""
    tensors = {
        name: value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
        for name, value in adapter.state_dict().items()
    }
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    space = ParameterSpace.of(adapter.model)
    shapes = {name: list(shape) for name, shape in space.shapes.items()}
    manifest = {
        "model": space.model,
        "model_fingerprint": space.fingerprint,
        "space": {"shapes": shapes, "aliases": space.aliases, "layout": space.layout},
        "options": adapter.options,
        "layers": list(adapter.coordinates),
        "fingerprint": adapter.fingerprint,
    }
    write(path, KIND, tensors, manifest)


def load(path: str | Path, model: nn.Module, freeze: bool = True) -> Adapter:
    """Put a saved adapter on a model.

    Args:
        path: What `Adapter.save` wrote.
        model: A model of the same shapes.
        freeze: As in `add`.

    Raises:
        ArtefactError: missing, damaged, or made for another model; the message says what differs.
    """
    manifest, tensors = read(path, KIND)
    base = unwrap(model)
    here = ParameterSpace.of(base)
    try:
        stored, options = manifest["space"], dict(manifest["options"])
        shapes = {name: tuple(map(int, shape)) for name, shape in stored["shapes"].items()}
        there = ParameterSpace(manifest["model"], shapes, stored["aliases"], stored["layout"])
        layers = [f"{layer}.weight" for layer in manifest["layers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error!r}); save the adapter again.") from error
    if gap := there.difference(here):
        raise ArtefactError(f"{path} fits another model: {gap}.")
    given: dict[str, Any] = {name: options[name] for name in ("kind", "rank", "quarantine_rank", "alpha", "seed")}
    if options["reserved"] == "axes":
        names = {layer: f"parts.{layer.replace('.', '/')}.quarantine.axes" for layer in manifest["layers"]}
        given["reserved"] = {layer: tensors[name] for layer, name in names.items() if name in tensors}
    else:
        given["reserved"] = options["reserved"]
    adapter = add(base, region(base, layers), **given, freeze=freeze)
    own = {name: value.shape for name, value in adapter.state_dict().items()}
    if own != {name: value.shape for name, value in tensors.items()}:
        adapter.remove()
        raise ArtefactError(f"{path} is damaged: its tensors are not those of its options; save the adapter again.")
    adapter.load_state_dict(tensors)
    return adapter
