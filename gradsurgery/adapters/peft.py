"""Two named LoRA adapters of PEFT, one kept and one in quarantine. Imports nothing of PEFT."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gradsurgery.adapters.handle import PARTS, Handle, Roles
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import region
from gradsurgery.anatomy.space import ParameterSpace, own_class, unwrap
from gradsurgery.errors import PlanError
from gradsurgery.tensors import replicated


class PeftAdapter(Handle):
    """A PEFT model's LoRA adapters as a kept and a quarantined part. Made by `from_peft`; ``host`` is the model itself.

    PEFT starts with ``B = 0``: until the first steps gradients by example are zero, and nothing can be scored. Weight
    decay towards zero is not towards the start: use ``gs.decay_to(adapter.quarantine, adapter.initial())``.
    """

    def __init__(self, model: nn.Module, names: dict[str, str]) -> None:
        self.model = self.host = model
        self.names, self.figures = dict(names), {}
        self.layers = _layers(model, names)
        self.coordinates = {path: int(layer.lora_A[names["kept"]].out_features) for path, layer in self.layers.items()}
        self._start = {
            name: p.detach().clone()
            for part in PARTS
            for name, p in self.parameters_of(part).items()  # type: ignore[arg-type]
        }

    @functools.cached_property
    def kept(self) -> Region:
        return self._region("kept")

    @functools.cached_property
    def quarantine(self) -> Region:
        return self._region("quarantine")

    def _region(self, part: str) -> Region:
        return region(self.host, [f"{path}.lora_{x}.{self.names[part]}.weight" for path in self.layers for x in "AB"])

    @property
    def roles(self) -> Roles:
        roles = Roles()
        kept, quarantined = self.names["kept"], self.names["quarantine"]
        for path, layer in self.layers.items():
            roles.kept[f"{path}.lora_A.{kept}"] = layer.lora_A[kept]
            roles.kept[f"{path}.lora_B.{kept}"] = layer.lora_B[kept]
            roles.kept_branches[f"{path}.lora_B.{kept}"] = layer.lora_B[kept]
            roles.quarantine_branches[f"{path}.lora_B.{quarantined}"] = layer.lora_B[quarantined]
            roles.probed[f"{path}.lora_A.{kept}"] = path
            names = [f"{path}.lora_{x}.{name}" for x in "AB" for name in (kept, quarantined)]
            roles.layers.update(dict.fromkeys(names, path))
        return roles

    def probe_output(self, module: nn.Module) -> bool:
        return True

    def about(self) -> dict[str, Any]:
        return {"kind": "peft", "model": ParameterSpace.of(self.model).fingerprint, "coordinates": self.coordinates}

    def spread(self) -> dict[str, float]:
        squares = dict.fromkeys(PARTS, 0.0)
        for layer in self.layers.values():
            for part, name in self.names.items():
                a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
                sizes = [float(x.detach().float().square().sum()) for x in (a, b)]
                squares[part] += scale**2 * (b.shape[0] * sizes[0] + a.shape[1] * sizes[1])
        return {part: total**0.5 for part, total in squares.items()}

    def initial(self) -> dict[str, Tensor]:
        return self._start

    def counterpart(self, name: str) -> str:
        return name.replace(f".{self.names['quarantine']}.weight", f".{self.names['kept']}.weight")

    def toward(self, layer: str, gains_R: Tensor) -> dict[str, Tensor]:
        own, kept = self.layers[layer], self.names["kept"]
        down, up = own.lora_A[kept].weight.detach(), own.lora_B[kept].weight.detach()
        gains_R = replicated(gains_R, down)
        return {
            f"{layer}.lora_A.{kept}.weight": gains_R[:, None] * down,
            f"{layer}.lora_B.{kept}.weight": up * gains_R,
        }

    def _kill_(self) -> None:
        for parameter in self.parameters_of("quarantine").values():
            parameter.zero_()

    @contextmanager
    def without(self, *parts: str) -> Iterator[None]:
        """A block in which ``"kept"``, ``"quarantine"`` or both add nothing: for generation, and as a reference."""
        self.require_parts(parts)
        off = [self.names[part] for part in parts]
        before = [(layer, layer._active_adapter) for layer in self.layers.values()]
        try:
            for layer, active in before:
                layer._active_adapter = [name for name in active if name not in off]
            yield
        finally:
            for layer, active in before:
                layer._active_adapter = active

    def remove(self) -> None:
        """Nothing: PEFT made the adapters, and ``model.delete_adapter(name)`` removes one."""


def from_peft(model: nn.Module, kept: str, quarantine: str) -> PeftAdapter:
    """Take two LoRA adapters of a PEFT model as the kept part and the quarantine; both become active and train.

    Args:
        model: A ``PeftModel``, or a model that transformers put adapters into.
        kept: Name of the adapter that stays.
        quarantine: Name of the one that is thrown away; on the same layers.

    Raises:
        PlanError: adapters that do not exist, lie on different layers, are no plain LoRA, or are merged.
    """
    base = unwrap(model)
    handle = PeftAdapter(base, {"kept": kept, "quarantine": quarantine})
    for layer in handle.layers.values():
        layer._disable_adapters = False
        layer._active_adapter = [kept, quarantine]
        for name in (kept, quarantine):
            for part in (layer.lora_A, layer.lora_B):
                part[name].weight.requires_grad_(True)
    return handle


def _layers(model: nn.Module, names: dict[str, str]) -> dict[str, Any]:
    if names["kept"] == names["quarantine"]:
        raise PlanError("from_peft: the kept part and the quarantine are two adapters, not one.")
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        layer: Any = module
        lora_a = getattr(layer, "lora_A", None)
        if not isinstance(lora_a, nn.ModuleDict):
            continue
        has = [name in lora_a for name in names.values()]
        if any(has) and not all(has):
            missing = next(name for name, is_there in zip(names.values(), has, strict=True) if not is_there)
            raise PlanError(f"from_peft: {path} has no adapter {missing!r}; both adapters must lie on the same layers.")
        if not any(has):
            continue
        if getattr(layer, "merged", False):
            raise PlanError(f"from_peft: adapters of {path} are merged; call model.unmerge_adapter() first.")
        for name in names.values():
            if own_class(lora_a[name]) is not nn.Linear or getattr(layer, "use_dora", {}).get(name):
                raise PlanError(f"from_peft: {path} is no plain LoRA of a linear layer; others cannot be routed.")
        found[path] = layer
    if not found:
        raise PlanError(
            f"from_peft: {type(model).__name__} has no LoRA adapters {' and '.join(map(repr, names.values()))}."
        )
    return found
