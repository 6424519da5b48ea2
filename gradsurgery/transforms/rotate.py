"""Freeze, mask or scale in rotated coordinates, in place: nothing is reparameterised, no weight is stored twice.

``dW <- dW - [(dW U) o M] U^T`` (WaRP: Kim et al. 2023, ICLR; column masks are GPM, Saha et al. 2021, arXiv 2103.09762,
row masks of left vectors are ActSVD, Wei et al. 2024, arXiv 2402.05162).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import nn

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace, require_unpacked
from gradsurgery.errors import PlanError
from gradsurgery.estimators.basis import Basis
from gradsurgery.estimators.coordinates import Coordinates
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.freeze import Freeze
from gradsurgery.transforms.mask import Mask
from gradsurgery.transforms.rotation.axes import local
from gradsurgery.transforms.rotation.weight import RotatedWeight
from gradsurgery.transforms.scale import Scale
from gradsurgery.transforms.stages import GradientTransform, StepContext, UpdateTransform


class Weights:
    """The rotated weights of some coordinates, planned when first seen: sharding replaces parameters."""

    def __init__(self, coordinates: Coordinates) -> None:
        self.coordinates = coordinates
        self.vectors: dict[Any, torch.Tensor] = {}
        self._planned: dict[str, RotatedWeight] = {}

    def __call__(self, name: str, parameter: nn.Parameter) -> RotatedWeight:
        if name not in self._planned:
            key, device = self.coordinates.basis.site(name).key, local(parameter).device
            stored = self.coordinates.basis.vectors[key]
            found = self.vectors.get((key, device, 0)) if stored is not None else None
            if found is None and stored is not None:
                found = stored.to(device)
            weight = self._planned[name] = RotatedWeight(self.coordinates, name, parameter, found)
            if weight.vectors is not None:
                weight.vectors = self._kept(key, weight.vectors, stored)
        return self._planned[name]

    def _kept(self, key: str, part: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor:
        """A part of a basis, on its weight's device once for all weights that need the same, without the rest."""
        assert stored is not None
        place = (
            (key, part.device, part.storage_offset(), *part.shape)
            if part.shape != stored.shape
            else (key, part.device, 0)
        )
        if place not in self.vectors:
            self.vectors[place] = part if part.shape == stored.shape or part.device == stored.device else part.clone()
        return self.vectors[place]

    def moving(self, parameters: Mapping[str, nn.Parameter]) -> Iterable[tuple[str, nn.Parameter, RotatedWeight]]:
        """Those that take part in this step and have coordinates that are meant."""
        for name in self.coordinates.names:
            parameter = parameters[name]
            if parameter.grad is not None and not (weight := self(name, parameter)).empty:
                yield name, parameter, weight


@dataclass(frozen=True, eq=False)
class RotatedUpdate(UpdateTransform):
    """Masked coordinates of the weights stay where they were at the first step, whatever the optimizer does; or move
    ``factor`` times as far as it takes them.

    Where they were is kept (fp32, as many numbers as are masked), and every step is put right against that, so that
    rounding does not build up. Weights that somebody else changes between two steps are looked at anew.
    """

    basis: Basis
    inner: Freeze | Scale | Mask
    gradient: bool = False
    traits = Traits(idempotent=True)

    @property
    def name(self) -> str:
        return "rotate"

    @property
    def coordinates(self) -> Coordinates:
        assert isinstance(self.inner.region, Coordinates)
        return self.inner.region

    @property
    def factor(self) -> float:
        return 0.0 if isinstance(self.inner, Freeze) else float(self.inner.factor)

    def regions(self) -> Iterable[Region]:
        return (self.coordinates.weights,)

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        require_unpacked(space, self.coordinates.names, "rotate")
        return {"weights": Weights(self.coordinates), "held": {}, "versions": {}, "moving": []}

    def _sleeps(self, context: StepContext) -> bool:
        return isinstance(self.inner, Freeze) and not self.inner.awake(context.ran)

    def prepare(self, context: StepContext, state: dict[str, Any]) -> None:
        if self._sleeps(context):
            return
        for _, parameter, weight in state["weights"].moving(context.parameters):
            if self.gradient or (weight.plain is not None and not self.factor):
                assert parameter.grad is not None
                weight.scale_(parameter.grad, self.factor)

    def before_step(self, context: StepContext, state: dict[str, Any]) -> None:
        state["moving"].clear()
        if self._sleeps(context):
            state["held"].clear()
            return
        for name, parameter, weight in state["weights"].moving(context.parameters):
            if name not in state["held"] or state["versions"].get(name) != _version(parameter):
                state["held"][name] = weight.take(parameter)
            state["moving"].append((name, parameter, weight))

    def after_step(self, context: StepContext, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter, weight in state["moving"]:
                weight.restore_(parameter, state["held"][name], self.factor)
                state["versions"][name] = _version(parameter)
        state["moving"].clear()
        if self.factor:
            state["held"].clear()

    def skip(self, state: dict[str, Any]) -> None:
        state["held"].clear()
        state["moving"].clear()

    def describe(self) -> str:
        return f"rotate({self.inner.describe()})"


def _version(parameter: nn.Parameter) -> tuple[int, int]:
    """Changes whenever the weight is written to by anybody who does not hide it."""
    own = local(parameter)
    return own.data_ptr(), own._version


@dataclass(frozen=True, eq=False)
class RotatedGradient(GradientTransform):
    """Masked coordinates of the gradient are multiplied by a factor: ``G <- G - (1 - factor) [(G U) o M] U^T``."""

    basis: Basis
    inner: Freeze | Scale | Mask
    traits = Traits(linear=True)

    @property
    def name(self) -> str:
        return "rotate"

    @property
    def coordinates(self) -> Coordinates:
        assert isinstance(self.inner.region, Coordinates)
        return self.inner.region

    def regions(self) -> Iterable[Region]:
        return (self.coordinates.weights,)

    def init(self, space: ParameterSpace) -> dict[str, Any]:
        require_unpacked(space, self.coordinates.names, "rotate")
        return {"weights": Weights(self.coordinates)}

    def apply(self, context: StepContext, state: dict[str, Any]) -> None:
        factor = 0.0 if isinstance(self.inner, Freeze) else float(self.inner.factor)
        for _, parameter, weight in state["weights"].moving(context.parameters):
            assert parameter.grad is not None
            weight.scale_(parameter.grad, factor)

    def describe(self) -> str:
        return f"rotate({self.inner.describe()}, gradient)"


@overload
def rotate(
    basis: Basis, inner: Freeze, at: Literal["update"] | None = None, gradient: bool = False
) -> RotatedUpdate: ...


@overload
def rotate(
    basis: Basis, inner: Scale | Mask, at: Literal["gradient"] | None = None, gradient: bool = False
) -> RotatedGradient: ...


@overload
def rotate(
    basis: Basis, inner: Freeze | Scale | Mask, at: Literal["update"], gradient: bool = False
) -> RotatedUpdate: ...


@overload
def rotate(
    basis: Basis, inner: Freeze | Scale | Mask, at: Literal["gradient"], gradient: bool = False
) -> RotatedGradient: ...


def rotate(
    basis: Basis,
    inner: Freeze | Scale | Mask,
    at: Literal["gradient", "update"] | None = None,
    gradient: bool = False,
) -> RotatedUpdate | RotatedGradient:
    """Apply ``inner`` in rotated coordinates, ``W~ = W U`` (``V^T W`` at the output side).

    ``rotate(basis, freeze(Coordinates(basis, mask)))`` in ``update=[…]`` keeps the masked coordinates where they were
    when the first step began, whatever momenta, decay and preconditioners do: after every step their deviation is
    taken out, ``W <- W - [(W U - W0~) o M] U^T``. ``mask`` and ``scale`` act on the gradient; at the update stage a
    scale lets the coordinates move that much of the way. Coordinates in a basis of signed unit vectors are entries, and
    what is frozen is then exactly what `gs.freeze` freezes.

    Costs a multiplication by ``U`` and one by its transpose a step, and as many fp32 numbers as are masked. Bases with
    few columns (``basis.top(k)``), or stored in bf16 (``basis.to(dtype=torch.bfloat16)``), cost less.

    Args:
        basis: From ``gs.estimators.activation_basis``.
        inner: ``gs.freeze``, ``gs.mask`` or ``gs.scale`` of `gs.Coordinates` in this basis.
        at: Stage; by default ``"update"`` for `gs.freeze`, ``"gradient"`` for the others.
        gradient: At the update stage: take the same part out of the gradient, so that neither a clip nor second
            moments see it (two more multiplications).

    Raises:
        PlanError: an inner transform or region of another kind, coordinates of another basis, quantised weights (at
            attach), shardings in which coordinates cannot be taken.

    Example:
        >>> basis = gs.estimators.activation_basis(model, [batch], "mlp", top_k=8)
        >>> update = gs.rotate(basis, gs.freeze(gs.Coordinates(basis)))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> name, weight = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight
        >>> before = (weight @ basis[name]).detach()
        >>> with gs.attach(gs.Method([gs.Pass("p")], update=[update]), model, optimizer) as surgery:
        ...     losses = surgery.backward(batch)
        ...     optimizer.step()
        >>> torch.allclose(weight @ basis[name], before, atol=1e-6)
        True
    """
    if not isinstance(basis, Basis):
        raise PlanError(f"rotate takes a basis first (gs.estimators.activation_basis), not {type(basis).__name__}.")
    if not isinstance(inner, Freeze | Scale | Mask):
        what = getattr(inner, "name", type(inner).__name__)
        raise PlanError(f"rotate takes gs.freeze, gs.mask or gs.scale of gs.Coordinates(basis, mask), not {what}.")
    region = inner.region
    if not isinstance(region, Coordinates):
        raise PlanError(
            f"rotate({inner.name}): the region {region.text or ''} holds parameter entries, and rotated coordinates "
            f"are none; write gs.{inner.name}(gs.Coordinates(basis, mask))."
        )
    if region.basis is not basis and region.basis.digest != basis.digest:
        raise PlanError(f"rotate: the coordinates are of another basis, {region.basis!r}, than {basis!r}.")
    if not isinstance(inner, Freeze):
        if inner.where is not None:
            raise PlanError(f"rotate: {inner.name} with where=… acts on single rows; the gradient is summed by then.")
        if isinstance(inner.factor, str):
            raise PlanError(f"rotate: scale takes a number here, not {inner.factor!r}.")
    stage = at or ("update" if isinstance(inner, Freeze) else "gradient")
    if stage not in ("gradient", "update"):
        raise PlanError(f'rotate: at is "gradient" or "update", not {at!r}.')
    if stage == "update":
        return RotatedUpdate(basis, inner, gradient)
    if isinstance(inner, Freeze) and inner.passes:
        raise PlanError("rotate: unless=… belongs to the update stage.")
    return RotatedGradient(basis, inner)
