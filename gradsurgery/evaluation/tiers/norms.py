"""Norms of units: of their weights, or of a gradient on them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradsurgery.anatomy.groups import Footprint
from gradsurgery.anatomy.space import unwrap
from gradsurgery.evaluation.modes import evaluating
from gradsurgery.evaluation.tiers.scores import predictions
from gradsurgery.keys.slots import Place
from gradsurgery.tensors import is_sharded


@torch.no_grad()
def unit_norms(tensors: Mapping[str, Tensor], place: Place) -> np.ndarray:
    """Euclidean norm over all slices of each slot of a place, ``[slots]`` float64.

    Args:
        tensors: By parameter name, of the parameters' shapes; what is absent counts as zero.
        place: The slots.
    """
    total = np.zeros(len(place))
    for part in place.parts:
        if not part.footprint.buffer:
            total += _squares(tensors, part.footprint, len(place))
    return np.sqrt(total)


def _squares(tensors: Mapping[str, Tensor], footprint: Footprint, count: int) -> np.ndarray:
    """Sum of squares of slice k of each unit."""
    varying = [d for d, rows in footprint.index.items() if (rows != rows[:1]).any()]
    if isinstance(footprint.name, str) and len(varying) == 1:
        if footprint.name not in tensors:
            return np.zeros(count)
        weight = whole(tensors[footprint.name])
        for dim, rows in footprint.index.items():
            if dim not in varying:
                weight = weight.index_select(dim, torch.from_numpy(rows[0]).to(weight.device))
        others = [d for d in range(weight.dim()) if d != varying[0]]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        norms = torch.linalg.vector_norm(weight, dim=others, dtype=wide) if others else weight.abs()
        lines: np.ndarray = norms.double().square().cpu().numpy()
        summed: np.ndarray = lines[footprint.index[varying[0]]].sum(1)
        return summed
    return np.asarray([_square(tensors, footprint, unit) for unit in range(count)])


def _square(tensors: Mapping[str, Tensor], footprint: Footprint, unit: int) -> float:
    name, index = footprint.slice_of(unit)
    if name not in tensors:
        return 0.0
    weight = whole(tensors[name])
    for dim, chosen in index.items():
        weight = weight.index_select(dim, torch.tensor(chosen, device=weight.device))
    return weight.double().square().sum().item()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under every name that it has."""
    return dict(unwrap(model).named_parameters(remove_duplicate=False))


def gradients_of(model: nn.Module, sequences: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Gradient of the mean next-token loss over all tokens, in eval mode; ``.grad`` is not touched."""
    named = weights_of(model)
    parameters = list(dict.fromkeys(named.values()))
    tokens = int((sequences[:, 1:] >= 0).sum())
    total: dict[Tensor, Tensor] = {}
    with ExitStack() as stack, evaluating(model), torch.enable_grad():
        for parameter in parameters:
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.requires_grad_(True)
                stack.callback(parameter.requires_grad_, False)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for batch in sequences.split(batch_size):
            logits, targets = predictions(model, batch)
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / tokens
            for parameter, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
                if grad is not None:
                    total[parameter] = total[parameter] + grad if parameter in total else grad
    return {name: total[parameter] for name, parameter in named.items() if parameter in total}
