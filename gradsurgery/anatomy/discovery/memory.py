"""What was found in this process, by all that determines it: equal models are examined once.

A key holds the classes of all modules with the functions they are made of, what the modules were configured with, and
the tensors' names and shapes, but no weights: those are randomised anyway. Where something else may play a part (hooks,
adapters, a forward of an instance's own, attributes of unknown kinds) there is no key, and nothing is remembered.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradsurgery.anatomy.groups import UnitGroup

from .plain import is_plain
from .replica import learned as tensors_learned

T = TypeVar("T")
MOST = 64
"""Findings that are kept; the one that was not asked for longest goes first."""

_known: OrderedDict[Hashable, Any] = OrderedDict()
_OWN = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = [name for name in vars(nn.Module()) if re.match(r"_(for|back)ward\w*hooks", name)]
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    enum.Enum,
    np.generic,
)
_CODE = (types.FunctionType, types.BuiltinFunctionType, type, torch.jit.ScriptFunction)


def recall(key: Hashable | None, make: Callable[[], T]) -> T:
    """What was found under ``key``, or else what ``make`` finds now; without a key, nothing is kept."""
    if key is None:
        return make()
    if key not in _known:
        _known[key] = make()
        while len(_known) > MOST:
            _known.popitem(last=False)
    _known.move_to_end(key)
    return _known[key]


def forget() -> None:
    """Forget everything."""
    _known.clear()


def key_of_twins(model: nn.Module, configs: Sequence[Any], *more: object) -> Hashable | None:
    """The key of what tiny twins of a model show; ``configs``: theirs. ``None`` where something else plays a part."""
    try:
        for module in model.modules():
            _require_bare(module)
        classes = dict.fromkeys(type(module) for module in model.modules())
        return "twins", type(model), tuple(map(_config, configs)), tuple(map(_code, classes)), repr(more)
    except _Unseen:
        return None


def key_of(model: nn.Module, *more: object) -> Hashable | None:
    """The key of what a model shows itself; ``None`` where something else than class, config and names plays a part."""
    if not is_plain(model):
        return None
    try:
        modules = tuple((path, type(m), _traits(m)) for path, m in model.named_modules())
        codes = tuple(map(_code, dict.fromkeys(kind for _, kind, _ in modules)))
        return "itself", modules, codes, tuple(_tensors(model)), repr(more)
    except _Unseen:
        return None


def fresh(groups: Sequence[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Copies of unit groups that share no array with them."""
    return tuple(
        replace(g, footprints=tuple(replace(f, index={d: a.copy() for d, a in f.index.items()}) for f in g.footprints))
        for g in groups
    )


def hollow(model: nn.Module) -> nn.Module:
    """Take the values out of a model that is only asked for names, shapes, ties and configs from now on."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        tensor.data = tensor.data.new_empty(()).expand(tensor.shape)
    return model


class _Unseen(Exception):
    """Something that a key cannot hold."""


def _require_bare(module: nn.Module) -> None:
    """Raise where an instance does more than its class says."""
    own = vars(module)
    if any(own[name] for name in _HOOKS if name in own) or not own.keys().isdisjoint(("forward", "_old_forward")):
        raise _Unseen
    adapted = hasattr(type(module), "adapter_layer_names") or "peft_config" in own
    if adapted or "parametrizations" in own["_modules"]:
        raise _Unseen


def _traits(module: nn.Module) -> Hashable:
    """What an instance was configured with."""
    _require_bare(module)
    return tuple((n, _frozen(value)) for n, value in vars(module).items() if n not in _OWN and n != "training")


def _frozen(value: Any) -> Hashable:
    """A value as part of a key."""
    if isinstance(value, (*_PLAIN, *_CODE)):
        return type(value), value
    if isinstance(value, Tensor):
        return _content(value)
    if hasattr(value, "to_dict"):  # configs
        return type(value), _config(value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_frozen, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_frozen, value))
    if isinstance(value, dict):
        return type(value), tuple((_frozen(k), _frozen(v)) for k, v in value.items())
    if isinstance(value, functools.partial):
        return value.func, _frozen(value.args), _frozen(value.keywords)
    raise _Unseen


def _config(config: Any) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def _tensors(model: nn.Module) -> Iterator[Hashable]:
    """Names, shapes and ties; and the values of what is not randomised, such as tables and masks."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, tuple(parameter.shape), parameter.dtype, first.setdefault(id(parameter), name)
    learned = {id(buffer) for _, buffer, is_buffer in tensors_learned(model) if is_buffer}
    for name, buffer in model.named_buffers():
        yield name, (tuple(buffer.shape), buffer.dtype) if id(buffer) in learned else _content(buffer)


def _content(tensor: Tensor) -> Hashable:
    shape = tuple(tensor.shape), tensor.dtype
    if tensor.is_meta:
        return shape
    values = tensor.detach().cpu().contiguous().flatten()
    return *shape, hashlib.sha256(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"").digest()


def _code(kind: type) -> Hashable:
    """The functions of a class, of its bases and of the file that it stands in: each may have been replaced."""
    own = [c for c in kind.__mro__ if c not in (nn.Module, object)]
    functions = tuple(v for c in own for v in vars(c).values() if isinstance(v, (*_CODE, property, staticmethod)))
    files = dict.fromkeys(c.__module__ for c in own if not c.__module__.startswith("torch.nn."))
    used = (v for f in files if f in sys.modules for v in vars(sys.modules[f]).values())
    return kind, functions, tuple(v for v in used if isinstance(v, _CODE))
