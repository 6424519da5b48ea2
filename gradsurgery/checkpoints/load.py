"""Read a checkpoint at this run's world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.checkpoints.manifest import MANIFEST, TENSORS, latest_checkpoint, read_manifest
from gradsurgery.checkpoints.random_state import set_random_state
from gradsurgery.checkpoints.ranks import grouped, quiet, rank, together, world_size
from gradsurgery.checkpoints.save import groups_of
from gradsurgery.checkpoints.tensors import MODEL, model_tensors, place_for_state, stored
from gradsurgery.errors import ArtefactError
from gradsurgery.files import read_json
from gradsurgery.keys.configuration import require_c1
from gradsurgery.surgery.checkpoint import load_state
from gradsurgery.surgery.surgery import Surgery


def load_checkpoint(folder: str | Path, surgery: Surgery, **stateful: Any) -> Any:
    """Go on where `save_checkpoint` left off, on any number of ranks.

    Attach the same method to the same model and optimizer first, sharded as this run shards. Weights and moments are
    read into place, each rank its part. The random states of ranks that the saved run did not have begin anew, drawn
    from the first one's.

    Args:
        folder: A folder of checkpoints, of which the last whole one counts, or one checkpoint.
        surgery: The surgery, with its optimizer bound where the saved one had one.
        stateful: The same names as in `save_checkpoint`; their ``load_state_dict`` is called.

    Returns:
        ``extra`` of `save_checkpoint`.

    Raises:
        ArtefactError: no checkpoint there, a damaged one, or one of another model, method or optimizer; nothing is
            changed then.
        KeyStateError: the model is keyed.
    """
    given = Path(folder)

    def checked() -> tuple[Any, ...]:
        require_c1(surgery.base, "load_checkpoint")
        directory = given if (given / MANIFEST).is_file() else latest_checkpoint(given)
        if directory is None:
            raise ArtefactError(f"{given} holds no whole checkpoint; save one with gs.save_checkpoint({folder!r}, …).")
        manifest = read_manifest(directory)
        reader = dcp.HuggingFaceStorageReader(str(directory / TENSORS))
        metadata = reader.read_metadata()
        require_fit(manifest, metadata, surgery, stateful)
        tensors, state = dict(model_tensors(surgery.base)), dict[nn.Parameter, dict[str, Any]]()
        if surgery.optimizer is not None:
            held, state = place_for_state(surgery.optimizer, surgery.base, metadata, manifest["optimizer"]["numbers"])
            tensors.update(held)
        random = [read_json(path, "a random state") for path in sorted(directory.glob("random-*.json"))]
        return manifest, reader, tensors, state, random, load_state(directory)

    reading = f"reading a checkpoint of {given}"
    manifest, reader, tensors, state, random, own = together(checked, reading)
    together(lambda: surgery.load_state_dict(own), reading)
    together(lambda: quiet(dcp.load)(tensors, storage_reader=reader, no_dist=not grouped()), reading)
    if surgery.optimizer is not None:
        put_state(surgery.optimizer, surgery.base, manifest["optimizer"]["groups"], state)
    for name, value in stateful.items():
        value.load_state_dict(manifest["stateful"][name])
    known = rank() < len(random)
    set_random_state(random[rank() if known else 0], fork=0 if known else rank())
    return manifest["extra"]


def require_fit(manifest: dict[str, Any], metadata: Metadata, surgery: Surgery, stateful: dict[str, Any]) -> None:
    """Raise unless the checkpoint is of this model, these tensors, this optimizer."""
    here = ParameterSpace.of(surgery.base).fingerprint
    if manifest["fingerprint"] != here:
        raise ArtefactError(f"this checkpoint is of a model {manifest['fingerprint']}, here {here}.")
    kept = metadata.state_dict_metadata
    mine = {name: tuple(value.shape) for name, value in model_tensors(surgery.base).items()}
    theirs = {name: tuple(about.size) for name, about in kept.items() if name.startswith(MODEL)}  # type: ignore[union-attr]
    if mine != theirs:
        name = next(n for n in {**theirs, **mine} if mine.get(n) != theirs.get(n))
        raise ArtefactError(
            f"{name.removeprefix(MODEL)} is {theirs.get(name, 'missing')} in this checkpoint, "
            f"{mine.get(name, 'missing')} in the model."
        )
    if set(manifest["stateful"]) != set(stateful):
        raise ArtefactError(
            f"this checkpoint keeps {sorted(manifest['stateful'])} besides model and optimizer; load_checkpoint got "
            f"{sorted(stateful)}."
        )
    optimizer, saved = surgery.optimizer, manifest.get("optimizer")
    if (optimizer is None) != (saved is None):
        raise ArtefactError(
            f"this checkpoint {'was saved without' if saved is None else 'holds'} an optimizer's state, and this "
            f"surgery has {'none' if optimizer is None else 'one'} bound: surgery.bind(optimizer)."
        )
    if optimizer is None or saved is None:
        return
    if type(optimizer).__name__ != saved["class"]:
        raise ArtefactError(f"this checkpoint was saved with {saved['class']}, here {type(optimizer).__name__}.")
    groups = [group["params"] for group in groups_of(optimizer, surgery.base)]
    if groups != [group["params"] for group in saved["groups"]]:
        raise ArtefactError(
            f"this checkpoint's parameter groups hold {[len(g['params']) for g in saved['groups']]} parameters, the "
            f"optimizer's {[len(g) for g in groups]}, or others: build it as in the first run."
        )
    owners = {owner for *_, owner in stored(metadata)} - {None}
    if owners and manifest["world_size"] != (size := world_size()):
        raise ArtefactError(
            f"{saved['class']} keeps state that is no sharded tensor, so that its {manifest['world_size']} ranks' "
            f"parts cannot be dealt out to {size}; resume with {manifest['world_size']} ranks."
        )


def put_state(
    optimizer: torch.optim.Optimizer,
    base: nn.Module,
    groups: list[dict[str, Any]],
    state: dict[nn.Parameter, dict[str, Any]],
) -> None:
    """Replace an optimizer's state and the settings of its groups."""
    optimizer.state.clear()
    for parameter, values in state.items():
        optimizer.state[parameter] = values
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in set(group) - set(saved) - {"params"}:
            del group[key]
        for key, value in saved.items():
            if key == "params":
                continue
            now = group.get(key)
            if isinstance(value, dict) and set(value) == {"dtype", "value"}:
                value = torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]))
            if isinstance(now, torch.Tensor):
                now.copy_(torch.as_tensor(value))
            else:
                group[key] = tuple(value) if isinstance(now, tuple) else value
