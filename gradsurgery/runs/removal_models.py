"""The models that a removal compares: plain training and filters, SGTM and its variants, unlearning afterwards."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from gradsurgery import losses, methods
from gradsurgery.anatomy import Anatomy, Region, Units, region
from gradsurgery.anatomy.dissect import dissect
from gradsurgery.errors import PlanError
from gradsurgery.runs import setup
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.removal import RemovalConfig
from gradsurgery.surgery import Method


@dataclass(frozen=True)
class Variant:
    """A model of a removal.

    Attributes:
        kind: What trains it.
        strategy: SGTM's, where it is not the configuration's.
        strict: Rows of adjacent categories count as labelled forget, too.
        after: The model that it starts from.
    """

    kind: Literal["plain", "data_filter", "sgtm", "rmu", "gradient_ascent", "npo"]
    strategy: Literal["mask", "detach", "zero"] | None = None
    strict: bool = False
    after: str | None = None


VARIANTS = {
    "plain": Variant("plain"),
    "data_filter": Variant("data_filter"),
    "strict_filter": Variant("data_filter", strict=True),
    "sgtm": Variant("sgtm"),
    "gradient_routing": Variant("sgtm", strategy="detach"),
    "activation_masking": Variant("sgtm", strategy="zero"),
    "rmu": Variant("rmu", after="plain"),
    "gradient_ascent": Variant("gradient_ascent", after="plain"),
    "npo": Variant("npo", after="plain"),
}


def variant_of(name: str) -> Variant:
    """A model by its name; a `PlanError` where there is none."""
    if name not in VARIANTS:
        raise PlanError(f"models are {', '.join(VARIANTS)}, not {name!r}.")
    return VARIANTS[name]


def require_models(names: list[str], relearn: bool = False) -> None:
    """Raise a `PlanError` for models that do not exist, or that come before what they start from or are held to."""
    for k, name in enumerate(names):
        after = variant_of(name).after
        if after is not None and after not in names[:k]:
            raise PlanError(f"{name} starts from the finished model of {after!r}: put {after} before it in models.")
    if relearn and names[:1] != ["plain"]:
        raise PlanError("relearning ends at the forget loss of plain: put plain first in models, or set relearn to 0.")
    if not names or len(set(names)) < len(names):
        raise PlanError(f"models names each model once, and at least one; given are {', '.join(names) or 'none'}.")


def build_model(config: RemovalConfig, tokenizer: Any) -> PreTrainedModel:
    """A model with fresh weights, the same for every method of one seed, or that of ``start_from``; in fp32."""
    if config.start_from is not None:
        return AutoModelForCausalLM.from_pretrained(config.start_from, dtype=torch.float32)
    return setup.build_model(config.model, tokenizer, config.seed)


def starting_model(name: str, config: RemovalConfig, tokenizer: Any, folder: RunFolder) -> PreTrainedModel:
    """What a model starts from."""
    after = VARIANTS[name].after
    if after is None:
        return build_model(config, tokenizer)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # until rank 0 has saved it
    return AutoModelForCausalLM.from_pretrained(folder / "models" / after, dtype=torch.float32)


def build_method(name: str, config: RemovalConfig, model: PreTrainedModel) -> tuple[Method, Units | None]:
    """The method of one of the models, and the units it removes afterwards."""
    variant, options = variant_of(name), config.unlearn
    weight: dict[str, Any] = {} if options.retain_weight is None else {"retain_weight": options.retain_weight}
    if variant.kind == "plain":
        return methods.plain(), None
    if variant.kind == "data_filter":
        return methods.data_filter(), None
    if variant.kind == "sgtm":
        return sgtm(variant, config, dissect(model))
    if variant.kind == "gradient_ascent":
        return methods.gradient_ascent(**weight), None
    if variant.kind == "npo":
        return methods.npo(losses.frozen(copy.deepcopy(model)), options.beta, **weight), None
    layer, trained = rmu_place(config, model)
    return methods.rmu(layer, trained, **weight, steering=options.steering, seed=config.seed), None


def sgtm(variant: Variant, config: RemovalConfig, anatomy: Anatomy) -> tuple[Method, Units]:
    options = config.sgtm
    numbers: dict[str, Any] = {"heads": options.heads, "neurons": options.neurons}
    if options.percent is not None:
        numbers = {"percent": options.percent}
    forget = methods.forget_units(anatomy, **numbers, layers=options.layers)
    chosen = {key: getattr(options, key) for key in ("strategy", "embeddings", "norms", "joint")}
    if variant.strategy is not None:
        chosen["strategy"] = variant.strategy
    return methods.sgtm(anatomy, forget, **chosen), forget


def rmu_place(config: RemovalConfig, model: PreTrainedModel) -> tuple[str, Region]:
    """The layer that RMU steers, and what it trains: as given, or found by the names of the MLPs' consumers."""
    options = config.unlearn
    if options.layer is not None and options.modules:
        return options.layer, region(model, options.modules)
    projections: dict[int, set[str]] = {}
    for group in dissect(model).groups:
        if group.kind == "neuron":
            projections.setdefault(group.layer, set()).update(slot[0] for slot in group.consumers[0])
    if not projections:
        raise PlanError(f"{type(model).__name__} has no MLP that was found: give unlearn.layer and unlearn.modules.")
    middle = sorted(projections)[(len(projections) - 1) // 2]
    if options.layer is not None:
        if (numbered := re.search(r"\.(\d+)(?:\.|$)", options.layer)) is None:
            raise PlanError(f"unlearn.layer={options.layer!r} has no number: give unlearn.modules, too.")
        middle = int(numbered[1])
    names = options.modules or sorted(n for k in range(middle - 2, middle + 1) for n in projections.get(k, ()))
    block = re.match(rf"(.*?\.{middle})\.", min(projections.get(middle, {""})))
    layer = options.layer or (block[1] if block else None)
    if layer is None or not names:
        raise PlanError("RMU's layer cannot be told from the names: give unlearn.layer and unlearn.modules.")
    return layer, region(model, names)
