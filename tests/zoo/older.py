"""Configs of transformers before the newest release: where their fields stand, and what they need to be built."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version

if TYPE_CHECKING:
    from tests.zoo.configs import Shape


def older_than(release: str) -> bool:
    """Whether the installed transformers is older than ``release``."""
    return Version(transformers.__version__) < Version(release)


def field_names(cls: type) -> list[str]:
    """The fields of a config class; before transformers 5.4, the arguments of it and of its bases."""
    if is_dataclass(cls):
        return [field.name for field in fields(cls)]
    inits = [signature(vars(base)["__init__"]) for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    named = [p.name for init in inits for p in init.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [name for name in dict.fromkeys(named) if name != "self"]


def older(kind: str, shape: Shape) -> dict[str, Any]:
    """Fields that model type ``kind`` needs in the installed release, sub-configs as nested dicts."""
    first_is_shared = {"layers_block_type": ["hybrid", "mamba"] * 2, "num_hidden_layers": 4}  # all tie to layer 0
    needs: dict[str, tuple[str, dict[str, Any]]] = {
        "dbrx": ("5.15", {"ffn_config": {"ffn_hidden_size": shape.hidden}}),  # the router's input has the MLP's width
        "jamba": ("5.15", {"use_mamba_kernels": False}),  # they need CUDA
        "jetmoe": ("5.1", {"pad_token_id": None}),  # the model reads a field that its config does not set
        "stablelm": ("5.1", {"pad_token_id": None}),
        "zamba": ("5.15", {"use_mamba_kernels": False}),
        "zamba2": ("5.4", {"use_mem_rope": True} | (first_is_shared if older_than("5.1") else {})),
    }
    release, own = needs.get(kind, ("0", {}))
    return own if older_than(release) else {}
