"""gradsurgery: composable gradient surgery on any Hugging Face model."""

import importlib
from typing import TYPE_CHECKING, Any

from gradsurgery import adapters, errors, estimators, keys, losses, methods
from gradsurgery.anatomy import Anatomy, Layout, Region, UnitGroup, Units, region
from gradsurgery.anatomy.dissect import dissect
from gradsurgery.estimators import Coordinates
from gradsurgery.keys import PermutationKey
from gradsurgery.surgery import Method, Pass, Surgery, attach, every, on_refresh, parameter_groups, sample_one
from gradsurgery.transforms import (
    PCGrad,
    ablate_,
    aggregate,
    applied,
    changed_fraction,
    clip,
    decay_to,
    detach,
    ema,
    freeze,
    leak,
    mask,
    project,
    prune_,
    reparametrised,
    rotate,
    scale,
    zero,
)
from gradsurgery.version import __version__

if TYPE_CHECKING:
    from gradsurgery import data as data
    from gradsurgery import evaluation as evaluation
    from gradsurgery import hub as hub
    from gradsurgery.checkpoints import latest_checkpoint as latest_checkpoint
    from gradsurgery.checkpoints import load_checkpoint as load_checkpoint
    from gradsurgery.checkpoints import save_checkpoint as save_checkpoint
    from gradsurgery.surgery.callback import SurgeryCallback as SurgeryCallback
    from gradsurgery.surgery.trainer import SurgeryTrainer as SurgeryTrainer

_LATE = {  # they need the extra "recipes", or are slow to import
    "data": "gradsurgery.data",
    "evaluation": "gradsurgery.evaluation",
    "hub": "gradsurgery.hub",
    "latest_checkpoint": "gradsurgery.checkpoints",
    "load_checkpoint": "gradsurgery.checkpoints",
    "save_checkpoint": "gradsurgery.checkpoints",
    "SurgeryCallback": "gradsurgery.surgery.callback",
    "SurgeryTrainer": "gradsurgery.surgery.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'gradsurgery' has no attribute {name!r}")
    try:
        module = importlib.import_module(_LATE[name])
    except ModuleNotFoundError as error:
        if str(error.name).startswith("gradsurgery"):
            raise
        raise ModuleNotFoundError(
            f'gradsurgery.{name} needs {error.name}: pip install "gradsurgery[recipes]".', name=error.name
        ) from error
    return module if _LATE[name].endswith(name) else getattr(module, name)


__all__ = [
    "Anatomy",
    "Coordinates",
    "Layout",
    "Method",
    "PCGrad",
    "Pass",
    "PermutationKey",
    "Region",
    "Surgery",
    "UnitGroup",
    "Units",
    "__version__",
    "ablate_",
    "adapters",
    "aggregate",
    "applied",
    "attach",
    "changed_fraction",
    "clip",
    "decay_to",
    "detach",
    "dissect",
    "ema",
    "errors",
    "estimators",
    "every",
    "freeze",
    "keys",
    "leak",
    "losses",
    "mask",
    "methods",
    "on_refresh",
    "parameter_groups",
    "project",
    "prune_",
    "region",
    "reparametrised",
    "rotate",
    "sample_one",
    "scale",
    "zero",
]
