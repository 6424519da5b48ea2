"""Bases of activations: eigenvectors of the second moment of what a layer reads.

``C = (1/N) sum_t x_t x_t^T = U diag(s) U^T`` (GPM: Saha et al. 2021, arXiv 2103.09762, section 4; WaRP: Kim et al.
2023, ICLR, section 3.2).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradsurgery.anatomy.adapters import base_of
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import Names
from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.estimators.basis import Basis, Side, Site, dtype_of
from gradsurgery.estimators.collect import Collector, Rows
from gradsurgery.estimators.covariance import Covariance, eigenbasis
from gradsurgery.estimators.data import DataDigest, on_device
from gradsurgery.estimators.operands import eager_experts
from gradsurgery.estimators.positions import Counted, Positions
from gradsurgery.estimators.targets import Target, targets_of
from gradsurgery.losses.positions import is_encoder_decoder
from gradsurgery.losses.references.base import evaluating, model_inputs
from gradsurgery.tensors import is_tensor_parallel


def activation_basis(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    modules: Names | Region = "all-linear",
    *,
    side: Side = "input",
    positions: Positions = "all",
    skip_first: int = 0,
    centre: bool = False,
    normalise: str | None = None,
    winsorise: float | None = None,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
    share: bool = True,
    passes: int = 1,
    device: torch.device | str | None = None,
    group: Any = None,
    progress: bool = False,
) -> Basis:
    """Orthonormal bases of what the layers of a model read (or give out), from forward passes over some batches.

    Second moments are summed in fp32 (fp64 in a float64 model) however the model is stored. Layers that read the very
    same tensor (q, k and v; gate and up) share one basis, which every batch is checked for.

    Args:
        model: The model; run in eval mode, without a graph, and left as it was.
        batches: Model inputs; ``attention_mask`` leaves padding out.
        modules: ``"all-linear"``: every linear layer, Conv1D, convolution (inputs are patches) and fused expert (each
            its own basis) but the output head; or names as in `gs.region`, or a region of whole weights.
        side: ``"input"`` gives ``U`` with ``W~ = W U``; ``"output"`` the left vectors ``V`` of ``W X``, ``W~ = V^T W``.
        positions: ``"response"`` counts only tokens that have a label.
        skip_first: Attended tokens at the start of each row that do not count. One BOS token may hold 98% of the
            energy of a layer.
        centre: Take the mean out: a covariance instead of a second moment.
        normalise: ``"token"`` divides every row by its length, so that all tokens weigh the same.
        winsorise: Limit the entries of every row: below 1 at this quantile of the row's own absolute values, from 1 on
            at so many times its root mean square.
        top_k: Keep the leading directions alone, in factored form ``[n, k]``.
        dtype: What vectors are stored in; by default fp32 (fp64 in a float64 model).
        share: ``False`` gives every layer a basis of its own.
        passes: Run the batches this many times, each time for one part of the layers: second moments are then held for
            one part at a time. Batches must be a sequence.
        device: Where finished vectors go; by default they stay with the model. With ``passes`` and ``"cpu"``, models
            whose dense bases do not fit next to them can have them.
        group: Process group whose ranks each see a part of the batches; their sums are added.
        progress: Show a bar.

    Raises:
        SelectionError: ``modules`` name no weight that a layer multiplies its input by.
        BatchError: batches in which nothing counts, activations with nan or inf (the layer is named), fewer rows than
            ``top_k``, padding that cannot be told apart, layers that were never called or that share an input in some
            batches only.
        PlanError: options out of range, quantised weights.

    Example:
        >>> basis = gs.estimators.activation_basis(model, [batch], "mlp")
        >>> basis["model.layers.0.mlp.up_proj.weight"].shape, len(basis), len(basis.vectors)
        (torch.Size([32, 32]), 6, 4)
        >>> basis.rank("model.layers.0.mlp.up_proj.weight", 0.99) <= 16
        True
    """
    _check(side, positions, skip_first, normalise, winsorise, top_k, passes, batches)
    base = unwrap(model)
    targets = targets_of(base, modules, "activation_basis")
    rows = Rows(centre, normalise, winsorise)
    digest = DataDigest()
    vectors: dict[str, Tensor | None] = {}
    values: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    sites: dict[str, Site] = {}
    for part in _parts(targets, passes):
        collector = Collector(part, rows, share and side == "input")
        collect(base, batches, collector, positions, skip_first, digest, progress)
        for key in list(collector.sums):
            covariance = collector.sums.pop(key)
            layout = collector.layout(key)
            members = [t.name for t in part if collector.key(t.name) == key]
            matrix, count = _second_moment(covariance, group)
            if side == "output":
                weight = layout.matrices(_whole(base, key)).to(matrix)
                matrix = weight @ matrix @ weight.mT
            _require_rank(top_k, matrix.shape[-1], count, key)
            own, values[key] = eigenbasis(matrix, top_k)
            del matrix, covariance
            vectors[key], counts[key] = own.to(device=device, dtype=dtype or own.dtype), count
            for name in members:
                sites[name] = Site(collector.layout(name), key)
    about = {
        "positions": positions,
        "skip_first": skip_first,
        "centre": centre,
        "normalise": normalise,
        "winsorise": winsorise,
        "top_k": top_k,
        "data": digest.hexdigest(),
        "dtype": dtype_of(base, list(sites)),
    }
    order = {t.name: sites[t.name] for t in targets}
    return Basis(ParameterSpace.of(base), side, order, vectors, values, counts, about)


def collect(
    base: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    collector: Collector,
    positions: Positions,
    skip_first: int,
    digest: DataDigest,
    progress: bool = False,
) -> None:
    """The forward passes: second moments of what the collector's layers read."""
    if is_tensor_parallel(base):
        raise PlanError(
            "activation_basis: what the layers of a tensor-parallel model read lies in parts on ranks; take the basis "
            "on one process, save it, and load it there."
        )
    decoder = is_encoder_decoder({}, base)
    seen = 0
    with evaluating(base), eager_experts(base), collector.listening():
        for batch in tqdm(batches, desc="activations", unit="batch", disable=not progress):
            digest.add(batch, seen)
            batch = on_device(batch, base)
            try:
                collector.counted = Counted(batch, positions, skip_first, decoder)
                base(**model_inputs(base_of(base), batch, decoder))
                collector.end_of_batch()
            except BatchError as error:
                raise BatchError(f"activation_basis, batch {seen}: {error}") from None
            seen += 1
    if not seen:
        raise BatchError("activation_basis: there are no batches.")
    collector.require_called()


def _parts(targets: Sequence[Target], passes: int) -> list[list[Target]]:
    edges = [len(targets) * k // passes for k in range(passes + 1)]
    return [list(targets[a:b]) for a, b in itertools.pairwise(edges) if b > a]


def _second_moment(covariance: Covariance, group: Any) -> tuple[Tensor, Tensor]:
    if group is not None:
        covariance.reduce(group)
    return covariance.matrix(), covariance.count


def _whole(base: nn.Module, name: str) -> Tensor:
    weight: Any = base.get_parameter(name).detach()
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


def _require_rank(top_k: int | None, width: int, count: Tensor, key: str) -> None:
    if top_k is None:
        return
    if top_k > width:
        raise PlanError(f"activation_basis: top_k={top_k}, and {key} has {width} directions.")
    if top_k > (most := int(count.max())):
        raise BatchError(
            f"activation_basis: top_k={top_k} directions of {key} from {most} rows, which span {most} at "
            f"most; give more data, or a smaller top_k."
        )


def _check(
    side: str,
    positions: str,
    skip_first: int,
    normalise: str | None,
    winsorise: float | None,
    top_k: int | None,
    passes: int,
    batches: Iterable[Mapping[str, Any]],
) -> None:
    choices: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "side": (side, ("input", "output")),
        "positions": (positions, ("all", "response")),
    }
    choices["normalise"] = (normalise, (None, "token"))
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            raise PlanError(f"activation_basis: {name} is one of {', '.join(map(repr, allowed))}, not {given!r}.")
    for name, number, least in (("skip_first", skip_first, 0), ("passes", passes, 1)):
        if type(number) is not int or number < least:
            raise PlanError(f"activation_basis: {name} is a whole number from {least} on, not {number!r}.")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise PlanError(f"activation_basis: top_k is a positive number of directions or None for all, not {top_k!r}.")
    if winsorise is not None and not winsorise > 0:
        raise PlanError(
            f"activation_basis: winsorise is a quantile below 1 or a multiple from 1 on, not {winsorise!r}."
        )
    if isinstance(batches, Mapping):
        raise PlanError("activation_basis takes several batches: write [batch].")
    if passes > 1 and iter(batches) is batches:
        raise PlanError("passes > 1 runs the batches several times, and an iterator can be run once; give a list.")
