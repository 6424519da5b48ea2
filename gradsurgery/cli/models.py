"""What a command means by a model: a folder, a config, a name or a type, built without storage."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradsurgery.anatomy.anatomy import Anatomy
from gradsurgery.anatomy.dissect import dissect
from gradsurgery.errors import ArtefactError, PlanError

MODEL = "folder with a config.json, a config.json, a hub name, or a model type such as llama (its default config)"


def add_model(command: argparse.ArgumentParser, nargs: str | None = None, more: str = "") -> None:
    """The positional argument that names a model, and how it is built."""
    command.add_argument("model", nargs=nargs, metavar="MODEL", help=MODEL + more)
    command.add_argument(
        "--auto-class", help="e.g. AutoModelForMaskedLM; default: what the config says, or a causal LM"
    )


def anatomy_of(source: str, auto_class: str | None) -> tuple[Anatomy, nn.Module]:
    """The anatomy of a model, and the model without storage.

    Raises:
        ArtefactError, PlanError, AnatomyError: there is no such model, or it cannot be built or explained.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = on_meta(config_of(source), auto_class)
        return dissect(model), model


def config_of(source: str) -> Any:
    """The config a path, hub name or model type means.

    Raises:
        ArtefactError: there is none; the message says what was tried.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    path = Path(source).expanduser()
    local = path.exists()
    if not local and source in CONFIG_MAPPING:
        return CONFIG_MAPPING[source]()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ArtefactError(f"{path} holds no config.json. Name a folder written by save_pretrained.")
    try:
        return AutoConfig.from_pretrained(path if local else source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if local:
            first = str(error).strip().splitlines()[0]
            raise ArtefactError(f"{path} is not a config that transformers knows: {first}") from error
        raise ArtefactError(
            f"{source!r} is neither a file or folder, nor a model type, and the hub does not give its config (offline, "
            f"or no such model). Download it once and name the folder: ./my-model."
        ) from error


def on_meta(config: Any, auto_class: str | None = None) -> nn.Module:
    """The model of a config, without storage.

    Raises:
        PlanError: no class of ``transformers`` can be built from it.
    """
    import transformers

    if auto_class is not None and not hasattr(getattr(transformers, auto_class, None), "from_config"):
        raise PlanError(f"transformers has no {auto_class!r} that builds from a config; try AutoModelForCausalLM.")
    makers = (
        [auto_class] if auto_class else [*_stated(config), "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"]
    )
    for name in makers:
        maker = getattr(transformers, name)
        try:
            with torch.device("meta"):
                model = maker.from_config(config) if name.startswith("Auto") else maker(config)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            continue
        model.tie_weights()  # transformers 5.0 leaves that out on meta
        return model
    raise PlanError(
        f"{makers[-1]} does not build from a {type(config).__name__}: {reason[:200]} Try another --auto-class."
    )


def _stated(config: Any) -> list[str]:
    import transformers

    return [name for name in config.architectures or () if hasattr(transformers, name)]
