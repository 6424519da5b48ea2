"""PEFT adapters: the model inside, and the same adapters in another instance of its class. Imports nothing of PEFT."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

from torch import nn

from gradsurgery.anatomy.discovery.names import canonical_of

LARGEST_RANK = 12


def base_of(model: nn.Module) -> nn.Module:
    """The model inside a ``PeftModel``, whose class and forward are the architecture's; any other model itself."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) and hasattr(model, "peft_config") else model


def activate_adapters(model: nn.Module) -> None:
    """Let every adapter take part in the forward, also those that are disabled, merged or not the active one."""
    for module in model.modules():
        if not hasattr(module, "adapter_layer_names") or not hasattr(module, "enable_adapters"):
            continue
        tuner: Any = module
        tuner.enable_adapters(True)
        if hasattr(tuner, "merged_adapters"):
            tuner.merged_adapters = []
            names = adapters_of(tuner)
            if len(names) > 1:
                tuner.set_adapter(names)


def adapted_like(model: nn.Module, fresh: nn.Module, most: int | None = None) -> nn.Module:
    """Put the adapters of ``model`` into ``fresh``, an instance of the same class that has none.

    Args:
        most: Largest rank; larger ones are cut.
    """
    configs = getattr(model, "peft_config", None)
    peft: Any = sys.modules.get("peft")
    if not isinstance(configs, dict) or peft is None:
        return fresh
    outer: Any = model if base_of(model) is not model else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the adapters were made
        for name, config in configs.items():
            own = _config_for(config, name, base_of(model), fresh, most)
            if outer is None:
                fresh = peft.inject_adapter_in_model(own, fresh, name)
            elif base_of(fresh) is fresh:
                fresh = type(outer)(fresh, own, name)
            else:
                fresh.add_adapter(name, own)  # type: ignore[operator]
    return fresh


def _config_for(config: Any, adapter: str, model: nn.Module, fresh: nn.Module, most: int | None) -> Any:
    """A copy of an adapter's config that names its places in ``fresh``: the counterparts of those in ``model``."""
    own = copy.deepcopy(config)
    own.inference_mode = False
    if getattr(own, "target_modules", None):
        own.target_modules = _targets(adapter, model, base_of(fresh))
        for field in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            if getattr(own, field, None):
                setattr(own, field, None)
    if hasattr(own, "init_lora_weights"):
        own.init_lora_weights = True
    if most is not None and isinstance(getattr(own, "r", None), int):
        own.r = min(own.r, most)
        if getattr(own, "rank_pattern", None):
            own.rank_pattern = {}
    return own


def _targets(adapter: str, model: nn.Module, fresh: nn.Module) -> list[str]:
    """The modules of ``fresh`` whose counterparts in ``model`` have the adapter.

    Where only some layers of ``model`` have it, the last one of ``fresh`` stays without.
    """
    has: dict[str, set[bool]] = {}
    for path, module in model.named_modules():
        if not path.endswith(".base_layer"):
            own = adapter in adapters_of(module) and not hasattr(module, "parameter_name")  # see target_parameters
            has.setdefault(canonical_of(_plain(path)), set()).add(own)
    targets: dict[str, list[str]] = {}
    for path, _ in fresh.named_modules():
        if True in has.get(form := canonical_of(_plain(path)), ()):
            targets.setdefault(form, []).append(path)
    return [path for form, paths in targets.items() for path in (paths[:-1] if False in has[form] else paths)]


def _plain(path: str) -> str:
    """A path without the layers that an adapter before put around it."""
    return path.replace(".base_layer", "")


def adapters_of(module: nn.Module) -> list[str]:
    """Names of the adapters of one layer."""
    parts: list[Any] = [getattr(module, name, None) for name in getattr(module, "adapter_layer_names", ())]
    return list(dict.fromkeys(key for part in parts if hasattr(part, "keys") for key in part.keys()))  # noqa: SIM118
