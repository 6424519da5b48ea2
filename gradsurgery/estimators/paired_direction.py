"""Where unwanted and wanted examples pull an adapter apart: singular directions of paired gradient differences.

The directions of projected GRPO (wassname, evil_MoE): by layer, the singular value decomposition of the differences,
signs by majority vote, and a noise floor from random directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.adapters import base_of
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import DataError, PlanError
from gradsurgery.estimators.data import DataDigest, examples_of, on_device
from gradsurgery.estimators.direction import Direction
from gradsurgery.losses.causal_lm import causal_lm
from gradsurgery.losses.references.base import evaluating, model_inputs

Loss = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Tensor]
Pairs = Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]

DRAWS = 200
"""Random directions by layer that the noise floor is taken from."""


def paired_direction(
    model: nn.Module,
    adapter: Any,
    pairs: Pairs,
    loss: Loss = causal_lm,
    k: int = 1,
    noise: Literal["drop", "keep"] = "drop",
    seed: int = 0,
) -> Direction:
    """The directions, by layer, in which unwanted examples pull an adapter and wanted ones do not.

    With ``f`` the gradient of one example's mean loss in the adapter's coordinates, by layer ``D = [f(unwanted_i) −
    f(wanted_i)]`` ``[pairs, coordinates]``, ``D = U S Vᵀ``; the axes are the first rows of ``Vᵀ``, each with the sign
    that most pairs have along it. A layer's agreement is the mean cosine of a pair with the first axis of all other
    pairs; below what random directions reach in 95 of 100 draws it is noise.

    Runs in eval mode with the quarantine off, an example at a time; gradients and modes are left as they were. Call it
    again to refresh a direction, and compare by ``new.overlap(old)``.

    Args:
        model: The model that has the adapter.
        adapter: From `gs.adapters.add`, still on the model.
        pairs: Batches ``(unwanted, wanted)``; row i of one belongs to row i of the other.
        loss: What is differentiated, ``loss(outputs, batch, refs)``.
        k: Axes a layer.
        noise: ``"drop"`` zeroes layers below the noise floor; ``"keep"`` only reports them.
        seed: Of the random directions.

    Raises:
        DataError: fewer than two pairs, sides of different length, pairs that do not differ, or no layer above noise.
        PlanError: an adapter of another model, or options out of range.

    Example:
        >>> adapter = gs.adapters.add(model, "q_proj", rank=4)
        >>> other = {name: x.flip(1) for name, x in batch.items()}
        >>> gs.estimators.paired_direction(model, adapter, [(batch, other)], noise="keep").coordinates
        {'model.layers.0.self_attn.q_proj': 4, 'model.layers.1.self_attn.q_proj': 4}
        >>> adapter.remove()
    """
    if type(k) is not int or k < 1:
        raise PlanError(f"paired_direction: k is a positive number of axes, not {k!r}.")
    if noise not in ("drop", "keep"):
        raise PlanError(f'paired_direction: noise is "drop" or "keep", not {noise!r}.')
    if unwrap(model) not in (adapter.model, adapter.host) or not getattr(adapter, "attached", True):
        raise PlanError("paired_direction: the adapter is not on this model; give the model that gs.adapters.add took.")
    layers = list(adapter.coordinates)
    differences, digest = [], DataDigest()
    for number, (unwanted, wanted) in enumerate(pairs):
        sizes = [_rows(side) for side in (unwanted, wanted)]
        if sizes[0] != sizes[1] or not sizes[0]:
            raise DataError(f"paired_direction: pair {number} has {sizes[0]} unwanted and {sizes[1]} wanted rows.")
        digest.add(
            {f"unwanted/{n}": v for n, v in unwanted.items()} | {f"wanted/{n}": v for n, v in wanted.items()}, number
        )
        for one, other in zip(examples_of(unwanted, sizes[0]), examples_of(wanted, sizes[0]), strict=True):
            differences.append(_gradient(adapter, one, loss, layers) - _gradient(adapter, other, loss, layers))
    if len(differences) < 2:
        raise DataError(f"paired_direction: two pairs at least, not {len(differences)}; one cannot be told from noise.")
    stacked_NC = torch.stack(differences)
    if not bool(torch.isfinite(stacked_NC).all()):
        raise DataError("paired_direction: gradients hold nan or inf; the pairs do, or the model.")
    generator = torch.Generator().manual_seed(seed)
    by_layer = dict(zip(layers, stacked_NC.split([adapter.coordinates[p] for p in layers], dim=1), strict=True))
    return _direction(by_layer, k, noise, generator, adapter, {"pairs": len(differences), "data": digest.hexdigest()})


def _direction(
    by_layer: Mapping[str, Tensor], k: int, noise: str, generator: torch.Generator, adapter: Any, about: dict[str, Any]
) -> Direction:
    if not any(bool(d.any()) for d in by_layer.values()):
        raise DataError("paired_direction: the two sides of every pair have the same gradients; there is no direction.")
    axes, values, agreement, floor = {}, {}, {}, {}
    for path, d_NR in by_layer.items():
        axes[path], values[path] = principal(d_NR, min(k, *d_NR.shape))
        agreement[path], floor[path] = agreement_of(d_NR), noise_floor(d_NR, generator)
    if noise == "drop":
        beaten = [path for path in axes if not agreement[path] > floor[path]]
        if len(beaten) == len(axes):
            raise DataError(
                f"paired_direction: in none of {len(axes)} layers do the pairs agree more than with random directions. "
                f'Give more or clearer pairs, or noise="keep" to take the directions all the same.'
            )
        for path in beaten:
            axes[path] = torch.zeros_like(axes[path])
    return Direction(axes, values, agreement, floor, adapter.fingerprint, about)


def principal(d_NR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors ``[k, R]`` with the sign of most rows, and their singular values."""
    d_NR = d_NR.double()
    _, s_K, axes_KR = torch.linalg.svd(d_NR, full_matrices=False)
    votes_K = torch.sign(d_NR @ axes_KR.T).sum(0)
    tie = votes_K == 0
    votes_K = torch.where(tie, torch.sign((d_NR @ axes_KR.T).sum(0)), votes_K)
    axes_KR = axes_KR * torch.where(votes_K < 0, -1.0, 1.0)[:, None]
    real = s_K > 1e-12 * s_K[0].clamp(min=torch.finfo(torch.float64).tiny)
    axes_KR = torch.where(real[:, None], axes_KR, 0.0)
    return axes_KR[:k].float().contiguous(), s_K[:k].float()


def agreement_of(d_NR: Tensor) -> float:
    """Mean over rows of the cosine with the first axis of all other rows."""
    d_NR = d_NR.double()
    count = len(d_NR)
    others = torch.stack([torch.cat([d_NR[:i], d_NR[i + 1 :]]) for i in range(count)])
    axes = [principal(rows, 1)[0][0].double() for rows in others]
    return float(sum(_cosine(row, axis) for row, axis in zip(d_NR, axes, strict=True))) / count


def noise_floor(d_NR: Tensor, generator: torch.Generator, share: float = 0.95) -> float:
    """The quantile of ``|mean cosine|`` of the rows with random directions."""
    unit_NR = torch.nn.functional.normalize(d_NR.double(), dim=1)
    drawn_DR = torch.randn(DRAWS, d_NR.shape[1], generator=generator, dtype=torch.float64)
    drawn_DR = torch.nn.functional.normalize(drawn_DR, dim=1).to(unit_NR.device)
    reached_D = (unit_NR.mean(0) @ drawn_DR.T).abs()
    return float(reached_D.sort().values[math.ceil(share * DRAWS) - 1])


def _cosine(a: Tensor, b: Tensor) -> float:
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0


def _gradient(adapter: Any, example: Mapping[str, Any], loss: Loss, layers: list[str]) -> Tensor:
    """Of one example, ``[coordinates of all layers]``."""
    host = adapter.host
    example = on_device(example, host)
    base = base_of(adapter.model)
    decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    inputs = model_inputs(base, example, decoder or getattr(loss, "takes_labels", False))
    with evaluating(host), adapter.without("quarantine"), torch.enable_grad(), adapter.probing() as probes:
        value = loss(host(**inputs), example, {})
        return probes.gradients(value, layers, keep_graph=False).sum(0)


def _rows(side: Any) -> int:
    if not isinstance(side, Mapping):
        raise DataError(f"paired_direction: pairs are (unwanted, wanted) batches, not {type(side).__name__}.")
    sizes = [v.shape[0] for v in side.values() if isinstance(v, Tensor) and v.dim()]
    return sizes[0] if sizes else 0
