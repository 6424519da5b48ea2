"""gradsurgery: composable gradient surgery on any Hugging Face model."""

import importlib
from typing import TYPE_CHECKING, Any

from gradsurgery import errors, keys, losses, methods
from gradsurgery.anatomy import Anatomy, Layout, Region, UnitGroup, Units, region
from gradsurgery.anatomy.dissect import dissect
from gradsurgery.keys import PermutationKey
from gradsurgery.surgery import Method, Pass, Surgery, attach, every, sample_one
from gradsurgery.transforms import ablate_, applied, clip, decay_to, detach, freeze, mask, prune_, scale, zero
from gradsurgery.version import __version__

if TYPE_CHECKING:
    from gradsurgery import data as data
    from gradsurgery import evaluation as evaluation
    from gradsurgery.surgery.callback import SurgeryCallback as SurgeryCallback
    from gradsurgery.surgery.trainer import SurgeryTrainer as SurgeryTrainer

_LATE = {  # they need the extra "recipes", or are slow to import
    "data": "gradsurgery.data",
    "evaluation": "gradsurgery.evaluation",
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
    "Layout",
    "Method",
    "Pass",
    "PermutationKey",
    "Region",
    "Surgery",
    "UnitGroup",
    "Units",
    "__version__",
    "ablate_",
    "applied",
    "attach",
    "clip",
    "decay_to",
    "detach",
    "dissect",
    "errors",
    "every",
    "freeze",
    "keys",
    "losses",
    "mask",
    "methods",
    "prune_",
    "region",
    "sample_one",
    "scale",
    "zero",
]
