"""``gs.adapters.add``: an adapter with a quarantine on the linear layers of any model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from gradsurgery.adapters.adapter import Adapter
from gradsurgery.adapters.axes import axes_of, coordinate_part
from gradsurgery.adapters.parts import LowRank, LowRankPart, Part
from gradsurgery.adapters.places import Place, places_of
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import Names
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.tensors import is_tensor_parallel


def add(
    model: nn.Module,
    modules: Names | Region = "all-linear",
    rank: int | None = None,
    quarantine_rank: int | None = None,
    kind: Literal["lora", "svd"] = "lora",
    alpha: float | None = None,
    seed: int = 0,
    reserved: bool | Any = False,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Put an adapter with a kept and a quarantined part on linear layers.

    The model computes what it did, bit for bit, until the adapter is trained. Its class, names and ``state_dict`` are
    untouched; ``adapter.remove()`` takes everything off.

    ``"lora"``: both parts are low-rank blocks ``B A − B₀A₀`` (`gradsurgery.adapters.parts.LowRank`) with scale
    ``alpha / rank``. ``"svd"``: ``y += U ((d_kept + d_quarantine) ⊙ Vh x)`` with the first ``rank`` axes of the
    weight's own singular basis.

    Args:
        model: Any model of ``nn.Linear`` and ``Conv1D`` layers; for ``"lora"`` also quantised ones.
        modules: Which layers, as in `gs.region`.
        rank: Of the kept part; by default 16, for ``"svd"`` all axes.
        quarantine_rank: By default as many. More capacity than the kept part's lets the quarantine learn everything
            (``adapter.describe()`` gives the ratios).
        kind: ``"lora"`` or ``"svd"``.
        alpha: Scale of the low-rank blocks, by default ``rank``.
        seed: Of ``A₀`` and ``B₀``, which depend on it and the layer's path alone.
        reserved: ``"svd"``: no second set of gains; the quarantine is ``quarantine_rank`` axes, spread evenly, that the
            kept part has not. A direction (or mapping from layer to orthonormal ``[k, rank]``) reserves those axes.
        freeze: The model's own parameters do not train while the adapter is on.
        dtype: Of the adapter; by default the weight's, fp32 for half precision and quantised ones.

    Raises:
        SelectionError: no linear layer, or one of another kind.
        PlanError: a rank above what a layer has, an option that does not go with the kind, quantised weights for
            ``"svd"``, layers that have an adapter already, or a tensor-parallel model.

    Example:
        >>> adapter = gs.adapters.add(model, "q_proj", rank=4)
        >>> adapter.describe()["capacity"]["parameters"]
        1.0
        >>> adapter.remove()
    """
    base = unwrap(model)
    if is_tensor_parallel(base):
        raise PlanError(
            "an adapter adds up whole inputs and outputs of layers, and a rank of a tensor-parallel model has parts of "
            "one or the other; shard the model by FSDP2 (fully_shard), or use DDP."
        )
    places = places_of(base, modules)
    _check(places, kind, rank, quarantine_rank, alpha, seed, reserved)
    if kind == "lora":
        rank = 16 if rank is None else rank
        quarantine_rank = rank if quarantine_rank is None else quarantine_rank
    options: dict[str, Any] = {
        "kind": kind,
        "rank": rank,
        "quarantine_rank": quarantine_rank,
        "alpha": alpha,
        "seed": seed,
    }
    options["reserved"] = reserved if isinstance(reserved, bool) else "axes"
    axes = None if isinstance(reserved, bool) else axes_of(reserved)
    parts: list[Part] = []
    for place in places:
        part = _low_rank(place, options) if kind == "lora" else coordinate_part(place, options, axes)
        weight: Any = place.module.weight
        own = dtype or (weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32)
        parts.append(part.to(weight.device, own))
    adapter = Adapter(base, places, parts, options)
    adapter.attach(freeze)
    return adapter


def _check(
    places: list[Place], kind: str, rank: Any, quarantine_rank: Any, alpha: Any, seed: Any, reserved: Any
) -> None:
    if kind not in ("lora", "svd"):
        raise PlanError(f'adapters: kind is "lora" or "svd", not {kind!r}.')
    for name, value in (("rank", rank), ("quarantine_rank", quarantine_rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise PlanError(f"adapters: {name} is a positive number, not {value!r}.")
    if type(seed) is not int:
        raise PlanError(f"adapters: seed is a whole number, not {seed!r}.")
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf
    ):
        raise PlanError(f"adapters: alpha is a positive number, not {alpha!r}.")
    if kind == "svd" and alpha is not None:
        raise PlanError('adapters: alpha scales low-rank blocks; kind="svd" has none.')
    if kind == "lora" and reserved is not False:
        raise PlanError('adapters: reserved axes are singular ones; use kind="svd".')
    if reserved is True and quarantine_rank is None:
        raise PlanError("adapters: reserved=True needs quarantine_rank, the number of axes that the quarantine gets.")
    default = 16 if kind == "lora" else None
    for place in places:
        most = min(place.inputs, place.outputs)
        for name, value in (("rank", rank or default), ("quarantine_rank", quarantine_rank)):
            if value is not None and value > most:
                raise PlanError(
                    f"adapters: {name}={value} is more than {place.path} has, which is [{place.outputs}, "
                    f"{place.inputs}]; give {most} or less, or leave it out of modules=…"
                )
        if reserved is True and quarantine_rank >= (rank or most):
            raise PlanError(
                f"adapters: {quarantine_rank} reserved axes leave nothing of {rank or most} at {place.path} to keep."
            )
        if kind == "svd" and place.quantised:
            raise PlanError(
                f"adapters: {place.path} is quantised ({place.quantised}), and its singular basis is not that of what "
                f'it computes; use kind="lora", or model.dequantize().'
            )
    for place in places:
        for hook in place.module._forward_hooks.values():
            if type(getattr(hook, "__self__", None)).__name__ == "_Adding":
                raise PlanError(f"adapters: {place.path} has an adapter already; call its remove() first.")


def _low_rank(place: Place, options: Mapping[str, Any]) -> LowRankPart:
    blocks = []
    for name in ("kept", "quarantine"):
        rank = options["rank" if name == "kept" else "quarantine_rank"]
        scale = 1.0 if options["alpha"] is None else options["alpha"] / rank
        text = f"{options['seed']}/{place.path}/{name}"
        generator = torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:15], 16))
        blocks.append(LowRank(place.inputs, place.outputs, rank, scale, generator))
    return LowRankPart(*blocks)
