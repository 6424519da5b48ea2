"""Adapters of our own: modules beside the model, added to what its linear layers compute by forward hooks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradsurgery.adapters.handle import PARTS, Handle, Roles
from gradsurgery.adapters.host import Adapted
from gradsurgery.adapters.parts import Diagonal, LowRankPart, Part
from gradsurgery.adapters.places import Place
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import region
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError
from gradsurgery.transforms.engine.hooks import is_compiled


class Adapter(nn.Module, Handle):
    """A kept and a quarantined part on some linear layers of a model. Made by `add`; see `Handle` for what it can do.

    The model's class, parameters and ``state_dict`` stay as they are. ``parameters()`` and ``state_dict()`` are the
    adapter's own, as of any module; surgeries, regions, DDP and Trainers take ``adapter.host``.
    """

    def __init__(
        self, model: nn.Module, places: Sequence[Place], parts: Sequence[Part], options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({key_of(place.path): part for place, part in zip(places, parts, strict=True)})
        self.options, self.active = dict(options), PARTS
        self.coordinates = {place.path: part.coordinates for place, part in zip(places, parts, strict=True)}
        self.figures = {}
        self.__dict__["model"] = model  # no child: the adapter's state_dict is its own
        self.__dict__["places"] = list(places)
        self.__dict__["host"] = Adapted(model, self)
        self._frozen: list[nn.Parameter] = []
        self._handles: list[RemovableHandle] = []
        self.attached = False

    places: list[Place]
    active: tuple[str, ...]

    def attach(self, freeze: bool) -> None:
        """Put the hooks on and, with ``freeze``, stop the model's own parameters from training."""
        for place, part in zip(self.places, self.parts.values(), strict=True):
            hook = _Adding(self, part)
            self._handles += [
                # before other hooks: those of a surgery may hand the layer an empty slice of its input
                place.module.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True),
                place.module.register_forward_hook(hook.after, always_call=True),
            ]
        if freeze:
            self._frozen = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        if is_compiled(self.model):
            torch.compiler.reset()  # graphs of earlier calls know nothing of hooks
        self.attached = True

    def remove(self) -> None:
        """Take the adapter off the model, whose own parameters train again if they did."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles, self._frozen, self.attached = [], [], False

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @functools.cached_property
    def kept(self) -> Region:
        return region(self.host, "adapter.parts.*.kept*.weight")

    @functools.cached_property
    def quarantine(self) -> Region:
        return region(self.host, "adapter.parts.*.quarantine*.weight")

    @property
    def roles(self) -> Roles:
        roles = Roles()
        for path, part in zip(self.coordinates, self.parts.values(), strict=True):
            name = f"adapter.parts.{key_of(path)}"
            kept: Any = part.kept
            own = {f"{name}.kept": kept} if isinstance(kept, Diagonal) else {}
            own = own or {f"{name}.kept.{n}": m for n, m in kept.named_children()}
            roles.kept.update(own)
            roles.layers.update(dict.fromkeys([name, f"{name}.kept", f"{name}.quarantine", *own], f"model.{path}"))
            roles.kept_branches[f"{name}.kept"] = kept
            roles.quarantine_branches[f"{name}.quarantine"] = part.quarantine  # type: ignore[assignment]
            roles.probed[f"{name}.kept" if isinstance(part, LowRankPart) else name] = path
        return roles

    def probe_output(self, module: nn.Module) -> bool:
        return False

    def about(self) -> dict[str, Any]:
        return {**self.options, "model": ParameterSpace.of(self.model).fingerprint, "coordinates": self.coordinates}

    def spread(self) -> dict[str, float]:
        found: dict[str, Any] = {name: [getattr(part, name).spread() for part in self.parts.values()] for name in PARTS}
        return {name: sum(s * s for s in values) ** 0.5 for name, values in found.items()}

    def initial(self) -> dict[str, Tensor]:
        named = {**self.parameters_of("kept"), **self.parameters_of("quarantine")}
        return {name: torch.zeros_like(p) for name, p in named.items()}

    def toward(self, layer: str, gains_R: Tensor) -> dict[str, Tensor]:
        part: Any = self.parts[key_of(layer)]
        name = f"adapter.parts.{key_of(layer)}.kept"
        return {f"{name}.{own}": value for own, value in part.kept.toward(gains_R).items()}

    def counterpart(self, name: str) -> str:
        return name.replace(".quarantine.", ".kept.")

    def _kill_(self) -> None:
        for part in self.parts.values():
            part.quarantine.kill_()  # type: ignore[operator, union-attr]

    @contextmanager
    def without(self, *parts: str) -> Iterator[None]:
        """A block in which ``"kept"``, ``"quarantine"`` or both add nothing: for generation, and as a reference."""
        self.require_parts(parts)
        before, self.active = self.active, tuple(p for p in self.active if p not in parts)
        try:
            yield
        finally:
            self.active = before

    def fold_(self) -> None:
        """Add the kept part to the model's own weights, and start it anew; the function stays, to rounding.

        Raises:
            PlanError: quantised weights, before anything is changed.
        """
        if packed := [place for place in self.places if place.quantised]:
            raise PlanError(
                f"fold_: {packed[0].path} is quantised ({packed[0].quantised}), and packed weights cannot be written. "
                f"Keep the adapter beside the model (adapter.save), or fold into model.dequantize()."
            )
        with torch.no_grad():
            for place, part in zip(self.places, self.parts.values(), strict=True):
                weight = place.weight_OI
                change = part.matrix().to(weight.device)  # type: ignore[operator]
                weight.copy_(weight.to(change.dtype) + change)
            for parameter in self.parameters_of("kept").values():
                parameter.zero_()

    def save(self, path: str | Path) -> None:
        """Write the adapter as one safetensors file with a manifest: version, the model's fingerprint, options."""
        from gradsurgery.adapters.store import save

        save(self, path)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _Adding:
    """``layer(x) + part(x)``."""

    def __init__(self, adapter: Adapter, part: nn.Module) -> None:
        self.adapter, self.part = adapter, part
        self.x: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = args[0] if args else next(iter(kwargs.values()))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x, self.x = self.x, None
        if output is None or x is None or not self.adapter.active:  # None: the layer was left by an exception
            return None
        weight = next(self.part.parameters())
        added = self.part(x.to(weight.dtype), self.adapter.active)
        return output + added.to(output.dtype)


def key_of(path: str) -> str:
    """A layer's path as a name that a ``ModuleDict`` takes."""
    return path.replace(".", "/")
