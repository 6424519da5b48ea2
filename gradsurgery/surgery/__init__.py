"""WHEN surgery happens: passes, methods, the handle that runs them, and Hugging Face trainers that host it."""

from typing import TYPE_CHECKING, Any

from gradsurgery.surgery.attach import attach
from gradsurgery.surgery.method import Method
from gradsurgery.surgery.parameter_groups import parameter_groups
from gradsurgery.surgery.passes import Pass
from gradsurgery.surgery.schedule import every, on_refresh, sample_one
from gradsurgery.surgery.surgery import Surgery

if TYPE_CHECKING:
    from gradsurgery.surgery.callback import SurgeryCallback
    from gradsurgery.surgery.trainer import SurgeryTrainer

__all__ = [
    "Method",
    "Pass",
    "Surgery",
    "SurgeryCallback",
    "SurgeryTrainer",
    "attach",
    "every",
    "on_refresh",
    "parameter_groups",
    "sample_one",
]

_HOSTS = {"SurgeryCallback": "callback", "SurgeryTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    """The hosts, imported on first use: ``transformers.Trainer`` is slow to import and needs accelerate."""
    if name not in _HOSTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        raise ImportError(f'gs.{name} needs accelerate: pip install "gradsurgery[recipes]".')
    return getattr(importlib.import_module(f"gradsurgery.surgery.{_HOSTS[name]}"), name)
