"""Models in wrappers: PEFT adapters whose weights say something, and what of an anatomy is the base model's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.zoo.builder import build, outputs_of

ADAPTER = re.compile(r"\.(lora_\w+)\.")


def adapted(name: str, *adapters: str, **config: Any) -> Any:
    """A model of the zoo in a ``PeftModel``, its adapters randomised, in float64 and eval mode."""
    import peft

    names = adapters or ("default",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [peft.LoraConfig(**{"r": 5, "target_modules": "all-linear", **config}) for _ in names]
        model = peft.get_peft_model(build(name), made[0], names[0])
        for other, its in zip(names[1:], made[1:], strict=True):
            model.add_adapter(other, its)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "magnitude" in path:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif "lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.double().eval()


def inner_outputs(model: Any) -> Callable[[Any], Tensor]:
    """Runs the model inside a ``PeftModel``, adapters included."""
    run = outputs_of(model.get_base_model())
    return lambda m: run(m.get_base_model())


def plain_name(name: str) -> str:
    """A parameter's name before its model was adapted."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace("_orig_mod.", "")


def base_units(anatomy: gs.Anatomy) -> dict[tuple, tuple]:
    """Everything that an anatomy says of the parameters that are no adapter's, under the names of the base model."""
    found = {}
    for group in anatomy.groups:
        slices = set()
        for k, footprint in enumerate(group.footprints):
            names = [footprint.name] if isinstance(footprint.name, str) else list(footprint.name)
            if any(ADAPTER.search(name) for name in names):
                continue
            index = tuple((dim, rows.tobytes()) for dim, rows in sorted(footprint.index.items()))
            slices.add((*map(plain_name, names), index, k in group.consumer_slots))
        if slices:
            parent = group.parent and plain_name(group.parent)
            found[group.kind, plain_name(group.name), group.layer] = (
                frozenset(slices),
                group.exchange_classes,
                group.closed,
                parent,
                group.parent_units,
            )
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a dissection must leave as it is."""
    return {
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "trains": [(id(p), p.requires_grad, p.dtype, p.grad is None) for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(before: dict[str, Any], model: nn.Module) -> None:
    after = state_of(model)
    assert all(torch.equal(before["values"].pop(n), t) for n, t in after.pop("values").items())
    assert not before.pop("values")
    assert torch.equal(before.pop("random"), after.pop("random"))
    assert before == after
