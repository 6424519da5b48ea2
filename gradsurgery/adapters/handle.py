"""What every adapter with a quarantine can do, whoever made its layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.adapters.probe import Grain, Probes
from gradsurgery.anatomy.region import Region
from gradsurgery.errors import ArtefactError, PlanError

PARTS = ("kept", "quarantine")


@dataclass(frozen=True)
class Roles:
    """The modules of `Handle.host`, by path, that routing acts on.

    Attributes:
        kept: Those whose weights are the kept part: ``nn.Linear``, or `gradsurgery.adapters.parts.Diagonal`.
        kept_branches: Those that all of the kept part's gradient passes, where rows are stopped: at their ``stop``, or
            else their input.
        quarantine_branches: Those whose output is what the quarantine adds, row by row.
        probed: Layer by the path of the module that sees its coordinates.
        layers: The adapted layer, as a path of the host, by the path of each of these modules.
    """

    kept: dict[str, nn.Module] = field(default_factory=dict)
    kept_branches: dict[str, nn.Module] = field(default_factory=dict)
    quarantine_branches: dict[str, nn.Module] = field(default_factory=dict)
    probed: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)


class Handle:
    """An adapter that is at work on a model.

    Attributes:
        model: The model.
        host: What a surgery is attached to: it calls the model, and its parameters are the model's and the adapter's.
        kept: The region, over ``host``, of the part that stays.
        quarantine: The region of the part that is thrown away.
        coordinates: Number of coordinates by layer, in which gradients by example are read.
        figures: What routing last measured; goes into ``surgery.metrics()``.
    """

    model: nn.Module
    host: nn.Module
    coordinates: dict[str, int]
    figures: dict[str, Any]

    @property
    def kept(self) -> Region:
        raise NotImplementedError

    @property
    def quarantine(self) -> Region:
        raise NotImplementedError

    @property
    def roles(self) -> Roles:
        raise NotImplementedError

    def leaves(self) -> dict[str, tuple[int, nn.Parameter]]:
        """Number of coordinates by layer, and a parameter that tells the device and dtype in which they are read."""
        modules = dict(self.host.named_modules())
        return {
            layer: (self.coordinates[layer], next(modules[path].parameters()))
            for path, layer in self.roles.probed.items()
        }

    def probe_output(self, module: nn.Module) -> bool:
        """Whether a probed module's output are the coordinates (else it has a ``probe``)."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What makes its coordinates what they are: plain data."""
        raise NotImplementedError

    def spread(self) -> dict[str, float]:
        """Root mean square of how far the layers' weights move when all entries of a part take a step of ±1."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """16 hex digits: equal for two adapters iff directions of one fit the other."""
        return hashlib.sha256(json.dumps(self.about(), sort_keys=True).encode()).hexdigest()[:16]

    def without(self, *parts: str) -> Any:
        """A block in which ``"kept"``, ``"quarantine"`` or both add nothing: for generation, and as a reference."""
        raise NotImplementedError

    def require_parts(self, parts: Sequence[str]) -> None:
        if not parts or set(parts) - set(PARTS):
            raise PlanError(f"without takes {' and '.join(map(repr, PARTS))}, not {', '.join(map(repr, parts))}.")

    @contextmanager
    def probing(self, grain: Grain = "sequence", shape: tuple[int, int] | None = None) -> Iterator[Probes]:
        """Gradients by example of the forwards inside the block; see `gradsurgery.adapters.probe`."""
        probes = Probes(grain, shape)
        modules = dict(self.host.named_modules())
        handles, changed = [], []
        try:
            for path, layer in self.roles.probed.items():
                module: Any = modules[path]
                if self.probe_output(module):
                    handles.append(module.register_forward_hook(_added(probes, layer)))
                else:
                    module.probe = _bound(probes, layer)
                    changed.append(module)
            yield probes
        finally:
            for handle in handles:
                handle.remove()
            for module in changed:
                module.probe = None

    def parameters_of(self, part: str) -> dict[str, nn.Parameter]:
        """The parameters of a part by their names in ``host``."""
        named = dict(self.host.named_parameters())
        return {name: named[name] for name in getattr(self, part).entries}

    def initial(self) -> dict[str, Tensor]:
        """What the parameters of both parts were when they were made, by name, for ``gs.decay_to``."""
        raise NotImplementedError

    def ablate_(
        self,
        reinit: Literal["init", "zero", "normal"] = "init",
        generator: torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Throw the quarantine away.

        Args:
            reinit: ``"init"`` puts it back to where it started, bit for bit, so that it adds nothing and can learn
                anew. ``"zero"`` adds nothing and never will. ``"normal"`` draws it with the standard deviation that the
                kept part's trained entries have by now, tensor by tensor.
            generator: For ``"normal"``.
            optimizer: Forget its moments of the quarantine, too.

        Raises:
            PlanError: an unknown ``reinit``.
        """
        if reinit not in ("init", "zero", "normal"):
            raise PlanError(f'ablate_: reinit is "init", "zero" or "normal", not {reinit!r}.')
        quarantined = self.parameters_of("quarantine")
        with torch.no_grad():
            if reinit == "zero":
                self._kill_()
            else:
                start, kept = self.initial(), self.parameters_of("kept")
                for name, parameter in quarantined.items():
                    parameter.copy_(start[name])
                    if reinit == "normal" and (other := kept.get(self.counterpart(name))) is not None:
                        moved = other - start[self.counterpart(name)].to(other)
                        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                        parameter.add_(noise * moved.float().square().mean().sqrt().to(parameter))
        for parameter in quarantined.values():
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)

    def toward(self, layer: str, gains_R: Tensor) -> dict[str, Tensor]:
        """The way in which the kept part's parameters, by name in ``host``, scale a layer's coordinates by gains."""
        raise NotImplementedError

    def counterpart(self, name: str) -> str:
        """The kept part's parameter that corresponds to one of the quarantine's."""
        raise NotImplementedError

    def _kill_(self) -> None:
        raise NotImplementedError

    def average_gradients_(self) -> None:
        """Average the adapter's gradients over ranks, for hosts that wrap the model alone in DDP, not ``host``."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for part in PARTS:
            for parameter in self.parameters_of(part).values():
                grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                dist.all_reduce(grad)
                parameter.grad = grad.div_(dist.get_world_size())

    def describe(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
        """Sizes of both parts, and how much more the quarantine can hold: plain data.

        ``capacity`` are ratios, quarantine over kept: of ``parameters``; ``frobenius``, how far one step of equal size
        on every entry moves the layers' weights (root mean square over signs); with an optimizer, ``learning_rate``:
        the same with each part's own learning rate. A quarantine of many times the kept part's capacity learns
        everything.
        """
        sizes = {part: getattr(self, part).numel() for part in PARTS}
        spread = self.spread()
        capacity = {"parameters": _ratio(sizes), "frobenius": _ratio(spread)}
        if optimizer is not None:
            rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
            mean = {}
            for part in PARTS:
                found = [(rates.get(id(p), 0.0), p.numel()) for p in self.parameters_of(part).values()]
                mean[part] = sum(rate * n for rate, n in found) / max(sum(n for _, n in found), 1)
            capacity["learning_rate"] = _ratio({part: mean[part] * spread[part] for part in PARTS})
        base = sum(p.numel() for p in self.model.parameters())
        return {"layers": len(self.coordinates), **sizes, "of_model": sizes["kept"] / base, "capacity": capacity}

    def require_direction(self, fingerprint: str, coordinates: Mapping[str, int], what: str) -> None:
        """Raise an ``ArtefactError`` unless a direction speaks of this adapter's coordinates."""
        if unknown := [path for path in coordinates if path not in self.coordinates]:
            raise ArtefactError(f"{what} is of {unknown[0]}, where this adapter has no layer; it was made for another.")
        for path, count in coordinates.items():
            if count != self.coordinates[path]:
                raise ArtefactError(
                    f"{what} has {count} coordinates at {path}, this adapter {self.coordinates[path]}; estimate it "
                    f"anew."
                )
        if fingerprint != self.fingerprint:
            raise ArtefactError(
                f"{what} was made for another adapter or model ({fingerprint}, here {self.fingerprint}: kind, ranks, "
                f"seed or shapes differ), whose coordinates mean something else; estimate it anew."
            )


def _ratio(of: Mapping[str, float]) -> float:
    return of["quarantine"] / of["kept"] if of["kept"] else float("inf")


def _bound(probes: Probes, layer: str) -> Any:
    return lambda h: probes(layer, h)


def _added(probes: Probes, layer: str) -> Any:
    return lambda module, args, output: output + probes(layer, output)
