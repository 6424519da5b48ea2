"""Representation misdirection for unlearning: what a layer says about forget data is steered to a random direction.

Li et al. 2024, "The WMDP Benchmark", arXiv 2403.03218, section 4; a baseline of SGTM (arXiv 2512.05648, section 5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.anatomy.region import Region
from gradsurgery.errors import PlanError, SelectionError
from gradsurgery.losses import Reference, snapshot
from gradsurgery.losses.activations import ActivationLoss, activation_mse, activations
from gradsurgery.methods.sources import By, require_weight, source
from gradsurgery.surgery import Method, Pass
from gradsurgery.transforms import freeze


@dataclass(frozen=True)
class Steering:
    """``coefficient * u``, u a unit vector drawn from ``U[0, 1)`` in each coordinate: the same for the same seed."""

    coefficient: float
    seed: int

    def __call__(self, found: Tensor, refs: Mapping[str, Any]) -> Tensor:
        drawn = torch.rand(found.shape[-1], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return (self.coefficient * drawn / drawn.norm()).to(found)


def rmu(
    layer: str,
    modules: Region,
    forget_coefficient: float = 1.0,
    retain_weight: float = 100.0,
    *,
    steering: float = 20.0,
    reference: Reference | None = None,
    seed: int = 0,
    by: By = "rows",
    forget: str = "forget",
    retain: str = "retain",
) -> Method:
    """``forget_coefficient * |h(x_f) - steering * u|^2 + retain_weight * |h(x_r) - h_frozen(x_r)|^2``, means.

    h are the activations that ``layer`` returns; u is one random unit vector. Nothing but ``modules`` moves: every
    other entry is bit for bit the same after every step. Means are over hidden units and the positions with
    ``attention_mask``.

    Layer and trained parameters are chosen by name. The paper steers layer 7 and trains the MLP output projections of
    layers 5 to 7: ``gs.region(model, r"model\\.layers\\.[567]\\.mlp\\.down_proj\\.weight")``.

    Args:
        layer: Name of the module whose output is steered, e.g. ``"model.layers.7"``.
        modules: What trains: ``gs.region(model, names)``.
        forget_coefficient: Weight of the steering loss.
        retain_weight: Weight of the retain loss (alpha, 100 to 1,200 in the paper); 0 leaves its pass out.
        steering: Length of the target (c; 20 in SGTM's runs, 6.5 to 300 in the paper).
        reference: The model before unlearning; by default a snapshot of ``modules``, taken at attach.
        seed: Of the direction.
        by: ``forget`` and ``retain`` name bool columns (``"rows"``) or sub-batches (``"stream"``).

    Raises:
        PlanError: an option out of range, or trained layers that all lie behind ``layer``.
        SelectionError: no parameter under ``layer``; (when attached) no module of that name.

    Example:
        >>> method = gs.methods.rmu("model.layers.1", gs.region(model, "model.layers.*.mlp.down_proj.weight"))
        >>> surgery = gs.attach(method, model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> rows = {"forget": torch.tensor([True, False]), "retain": torch.tensor([False, True])}
        >>> losses = surgery.backward({**batch, **rows})
        >>> losses["forget"] > 0, losses["retain"].item()              # nothing has moved yet
        (tensor(True), 0.0)
        >>> surgery.remove()
    """
    if not isinstance(modules, Region):
        raise PlanError(f"rmu: modules is a region, gs.region(model, names), not {type(modules).__name__}.")
    require_before(layer, modules)
    push = require_weight(forget_coefficient, "forget_coefficient", "rmu", positive=True)
    hold = require_weight(retain_weight, "retain_weight", "rmu")
    length = require_weight(steering, "steering", "rmu", positive=True)
    here = activations(layer)
    steer = ActivationLoss(Steering(length, int(seed)), f"steer({length:g}, seed {seed})")
    passes = [Pass("forget", steer, weight=push, refs={"activations": here}, **source(by, forget, "rmu"))]
    if hold:
        before = activations(layer, of=reference or snapshot(modules))
        refs = {"activations": here, "reference": before}
        passes.append(Pass("retain", activation_mse, weight=hold, refs=refs, **source(by, retain, "rmu")))
    others = ~modules
    return Method(passes, update=[freeze(others)] if others else [])


def require_before(layer: str, modules: Region) -> None:
    """Raise unless the layer holds parameters, and every trained block comes no later than it."""
    names = [*modules.space.shapes, *modules.space.aliases]
    if not any(name.startswith(f"{layer}.") for name in names):
        raise SelectionError(f"rmu: no parameter of {modules.space.model} lies in a module {layer!r}.")
    if not modules:
        raise SelectionError("rmu: modules is empty, so that nothing would be unlearned.")
    if (numbered := re.search(r"^(.*?)\.(\d+)(?=\.|$)", layer)) is None:
        return
    stack, last = numbered[1], int(numbered[2])
    behind = []
    for name in modules.entries:
        found = re.match(rf"{re.escape(stack)}\.(\d+)\.", name)
        behind += [name] if found and int(found[1]) > last else []
    if behind:
        raise PlanError(
            f"rmu: {behind[0]} lies behind {layer}, whose activations it cannot change, and would never move; leave it "
            f"out of modules."
        )
