"""``gradsurgery inspect``: the anatomy of a model, from its config alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradsurgery.anatomy.anatomy import Anatomy
from gradsurgery.anatomy.dissect import dissect
from gradsurgery.anatomy.entries import Entries, all_bits, indices_of, span_of
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.units import Units
from gradsurgery.errors import ArtefactError, PlanError


def inspect(source: str, auto_class: str | None, save: Path | None, select: str | None, groups: bool) -> None:
    """Print the anatomy of ``source``; see ``gradsurgery inspect --help``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(source)
        anatomy = dissect(on_meta(config, auto_class))
    print(anatomy)
    if groups:
        print_groups(anatomy)
    if select is not None:
        print_region(anatomy.select(select))
    if save is not None:
        anatomy.save(save)
        print(f"saved {save}")


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
            f"or no such model). Download it once and name the folder: gradsurgery inspect ./my-model."
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


def print_groups(anatomy: Anatomy) -> None:
    print(f"\n{len(anatomy.groups)} groups")
    width = max((len(group.name) for group in anatomy.groups), default=0)
    for group in anatomy.groups:
        classes = len(set(group.exchange_classes))
        notes = [] if classes < len(group) or len(group) == 1 else ["not exchangeable"]
        notes += ["several exchange classes"] if 1 < classes < len(group) else []
        notes += [] if group.closed else ["not closed"]
        print(f"{group.layer:4d}  {group.kind:9s}{group.name:{width}s}{len(group):7,d}  {', '.join(notes)}".rstrip())


def print_region(region: Region) -> None:
    count = f"{region.count:,} units, " if isinstance(region, Units) else ""
    print(
        f"\n{region.text or 'selection'}: {count}{region.numel():,} entries, {100 * region.fraction:.3f}% of the model"
    )
    width = max((len(name) for name in region.entries), default=0)
    for name, entries in region.entries.items():
        parts = [_show(entries, box) for box in entries.boxes()]
        shown = " ".join(parts[:3]) + (f" … {len(parts)} parts" if len(parts) > 3 else "")
        print(f"  {name:{width}s}  {entries.numel():>12,d}  {shown}")


def _show(entries: Entries, box: tuple[int, ...]) -> str:
    return "[" + ", ".join(_show_bits(bits, n) for bits, n in zip(box, entries.shape, strict=True)) + "]"


def _show_bits(bits: int, size: int) -> str:
    """Indices as Python slices: ``:``, ``3:7``, or runs ``{0:2, 5:6, …}``."""
    if bits == all_bits(size):
        return ":"
    if (span := span_of(bits)) is not None:
        return f"{span[0]}:{span[1]}"
    runs: list[list[int]] = []
    for index in indices_of(bits).tolist():
        if runs and runs[-1][1] == index:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    shown = ", ".join(f"{start}:{stop}" for start, stop in runs[:4])
    return "{" + shown + (f", … {len(runs)} runs" if len(runs) > 4 else "") + "}"
