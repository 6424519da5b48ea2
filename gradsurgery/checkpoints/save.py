"""Write a checkpoint: every rank its part, under a name of its own, renamed when all of it is on the disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.checkpoints.manifest import KIND, MANIFEST, TENSORS, name_of, sizes, steps_in
from gradsurgery.checkpoints.random_state import random_state
from gradsurgery.checkpoints.ranks import grouped, on_first, quiet, rank, together, world_size
from gradsurgery.checkpoints.tensors import model_tensors, named, number, split_state
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.files import write_json
from gradsurgery.formats import stamp
from gradsurgery.keys.configuration import require_c1
from gradsurgery.surgery.checkpoint import save_state
from gradsurgery.surgery.surgery import Surgery


def save_checkpoint(
    folder: str | Path, surgery: Surgery, extra: Any = None, keep: int | None = None, **stateful: Any
) -> Path:
    """Everything that a run needs to go on, between two steps: ``folder/step-00000120``.

    Weights, the bound optimizer's state, the surgery's (stateful transforms, kept slots, references, the configuration
    that moments are in), and each rank's random state. Keys are never in it, only their fingerprints; bases and other
    artefacts stay in files of their own, and the method of the resumed run must be made of the same ones.

    The folder appears under its name when everything in it is on the disk: a run that is killed while it saves resumes
    from the checkpoint before. Under FSDP2 every rank writes its shards (safetensors, through
    ``torch.distributed.checkpoint``), and any number of ranks reads them. All ranks must call this. For a stock
    checkpoint to load with ``from_pretrained``, save the model as well, as you would without us.

    Args:
        folder: Of the run's checkpoints.
        surgery: The surgery, which knows model and optimizer.
        extra: Anything of yours that JSON can hold, such as the position in the data; of rank 0.
        keep: Delete all but the last so many checkpoints afterwards; by default none.
        stateful: What else has a ``state_dict`` of numbers: ``scheduler=scheduler``, ``scaler=scaler``.

    Raises:
        KeyStateError: the model is keyed.
        PlanError: gradients wait for a step, an optimizer that steps other models, or state that is no number.
        ArtefactError: this step is saved already; the disk is full, on any rank.

    Example:
        >>> import tempfile
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with gs.attach(gs.methods.sgtm(anatomy, anatomy.heads[:, -1:]), model, optimizer) as surgery:
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         path = gs.save_checkpoint(folder, surgery, extra={"epoch": 0})
        ...         print(path.name, gs.load_checkpoint(folder, surgery))
        step-00000000 {'epoch': 0}
    """
    if keep is not None and keep < 1:
        raise PlanError(f"keep={keep}: keep one checkpoint at least, or all with None.")
    folder = Path(folder)
    final = folder / name_of(surgery.step)
    part = folder / f".{final.name}.part"
    tensors, manifest, own = together(lambda: collected(surgery, extra, stateful), "saving a checkpoint")

    def make_room() -> None:
        if final.exists():
            raise ArtefactError(f"{final} is there already: step {surgery.step} was saved before; save after a step.")
        for cut_off in folder.glob(".step-*"):
            shutil.rmtree(cut_off)
        part.mkdir(parents=True)

    def seal(state: dict[str, Any]) -> None:
        save_state(state, part)
        write_json(part / MANIFEST, {**manifest, "files": sizes(part)})
        os.replace(part, final)
        flush(folder)
        for old in steps_in(folder)[:-keep] if keep else []:
            going = old.with_name(f".{old.name}.old")  # a kill must not leave half of it under its name
            os.replace(old, going)
            shutil.rmtree(going)

    on_first(make_room, "saving a checkpoint")
    written = "writing a checkpoint"
    writer = dcp.HuggingFaceStorageWriter(str(part / TENSORS), save_distributed=True)
    try:
        state = surgery.state_dict()  # all ranks: it gathers
        together(lambda: quiet(dcp.save)(tensors, storage_writer=writer, no_dist=not grouped()), written)
        together(lambda: write_json(part / f"random-{rank():05d}.json", own), written)
        on_first(lambda: seal(state), written)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def collected(surgery: Surgery, extra: Any, stateful: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """This rank's tensors, the manifest without its files, and this rank's random state; everything checked."""
    base, optimizer = surgery.base, surgery.optimizer
    require_c1(base, "save_checkpoint")
    if surgery.pending:
        raise PlanError("gradients of an unfinished step would be lost: save after optimizer.step().")
    try:
        json.dumps(extra if rank() == 0 else None)
    except (TypeError, ValueError) as error:
        raise PlanError(f"extra={extra!r} is nothing that JSON holds ({error}); give numbers, text, lists.") from None
    manifest: dict[str, Any] = {
        **stamp(KIND),
        "fingerprint": ParameterSpace.of(base).fingerprint,
        "step": surgery.step,
        "world_size": world_size(),
        "extra": extra,
        "stateful": {name: plain(value.state_dict(), name) for name, value in stateful.items()},
    }
    tensors = dict(model_tensors(base))
    if optimizer is not None:
        held, numbers = split_state(optimizer, base)
        tensors.update(held)
        manifest["optimizer"] = {
            "class": type(optimizer).__name__,
            "groups": groups_of(optimizer, base),
            "numbers": numbers,
        }
    return tensors, manifest, random_state()


def groups_of(optimizer: torch.optim.Optimizer, base: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with names for parameters."""
    names = named(optimizer, base)
    out = []
    for group in optimizer.param_groups:
        rest = {k: plain(v, f"parameter group {k!r}") for k, v in group.items() if k != "params"}
        out.append({**rest, "params": [names[p] for p in group["params"]]})
    return out


def plain(value: Any, what: str) -> Any:
    """``value`` as JSON holds it."""
    if isinstance(value, dict):
        return {str(k): plain(v, what) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, what) for v in value]
    return number(value, what)


def flush(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
