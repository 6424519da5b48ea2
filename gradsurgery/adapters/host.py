"""The model and its adapter as one module: what a surgery, DDP or a Trainer is given."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


class Adapted(nn.Module):
    """``adapter.host``: calls the model, and holds the adapter's parameters beside the model's.

    The model itself stays what it is, with its class, names and ``state_dict``. Here its parameters are named
    ``model.…`` and the adapter's ``adapter.…``, so that regions, gradient stages and optimizers can speak of both, and
    DDP reduces both. Public attributes that it does not have (``config``, ``generate``, …) are the model's. Its
    ``state_dict`` has tied weights once, since checkpoints in safetensors cannot hold them twice.
    """

    def __init__(self, model: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter
        self.__dict__["forward"] = _Forward(model)  # not the class's: it shows another signature
        self.register_state_dict_post_hook(_drop_aliases)
        self.register_load_state_dict_pre_hook(_add_aliases)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # marks of wrappers and copies, which this module has none of
                raise
            return getattr(super().__getattr__("model"), name)


def _aliases(host: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, with the first one of each."""
    first: dict[int, str] = {}
    named = list(host.named_parameters(remove_duplicate=False))
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def _drop_aliases(host: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _aliases(host):
        state.pop(prefix + name, None)


def _add_aliases(host: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in _aliases(host).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


class _Forward:
    """Calls the model; shows its signature, by which a surgery knows what it takes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
