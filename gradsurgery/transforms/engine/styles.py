"""Tensor-parallel styles: under which of them a region is, on each rank, a part of what the rank computes with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from gradsurgery.anatomy.space import own_class
from gradsurgery.errors import PlanError
from gradsurgery.tensors import is_laid_out, is_sharded

SUPPORTED = ("colwise", "colwise_gather_output", "rowwise", "rowwise_split_input", "embedding_rowwise")
"""Styles of transformers' plans under which a rank's part of a weight is a part of every region of it."""

SUMMED = "replicated_with_grad_allreduce"
"""The style of norms of single heads: each rank has all of the weight, and the gradient of its own heads alone. A hook
sums ``.grad`` over ranks after every backward, with all that it held before."""

REASONS = {
    "packed_colwise": "interleaves the parts of a fused weight, so that no rank holds consecutive rows of it",
    "packed_rowwise": "interleaves the parts of a fused weight, so that no rank holds consecutive columns of it",
    "moe_tp_experts": "runs experts on local weights, where rows of examples and units cannot be told apart",
    "mla_kv_a_proj": "reduces a part of a layer's output gradient inside of it, which hooks would leave out",
    "sequence_parallel": "deals tokens out over ranks, so that labels of rows do not fit what a rank computes",
}
"""Why regions are not expressible under other styles."""


def require_expressible(base: nn.Module) -> None:
    """Raise for a tensor-parallel model in which a region is not, on each rank, a part of what the rank computes with.

    Raises:
        PlanError: a style of transformers' plan under which surgery would be wrong, or weights cut in another way.
    """
    styles = styles_of(base)
    for name, style in styles.items():
        if style not in (*SUPPORTED, SUMMED):
            why = REASONS.get(style, "is not known to leave gradients whole")
            raise PlanError(
                f"the tensor-parallel plan has {style!r} for {name}, which {why}; shard the model by FSDP2 "
                f"(fully_shard), or use DDP."
            )
    for path, module in base.named_modules():
        if path in styles and not is_laid_out(module):
            raise PlanError(
                f"{path} is a part of a tensor-parallel plan, and its forward is none that surgery knows from "
                f"transformers 5.23; update transformers, or shard the model by FSDP2 (fully_shard)."
            )
        for attribute, parameter in module.named_parameters(recurse=False):
            if not is_sharded(parameter):
                continue
            placements: tuple[Any, ...] = parameter.placements  # type: ignore[attr-defined]
            known = own_class(module) is nn.Linear or (isinstance(module, nn.Embedding) and path in styles)
            if not known or len(placements) > 1 or not _fits(placements[0], attribute):
                raise PlanError(
                    f"{path}.{attribute} ({type(module).__name__}) is laid out over ranks as {placements}; surgery "
                    f"knows linear layers cut along one dimension, and tables by a plan of transformers "
                    f"(DistributedConfig(tp_size=…)); shard the model by FSDP2 (fully_shard), or use DDP."
                )


def styles_of(base: nn.Module) -> dict[str, str]:
    """The style of each module that transformers has made parallel, by path; empty where somebody else has."""
    if (getattr(base, "tp_size", None) or 1) < 2:
        return {}
    plan: Mapping[str, str] = getattr(base, "tp_plan", None) or {}
    paths = {path: re.sub(r"\.\d+(?=\.|$)", ".*", path) for path, _ in base.named_modules()}
    return {path: plan[pattern] for path, pattern in paths.items() if pattern in plan}


def summed_apart(base: nn.Module) -> frozenset[str]:
    """Names of the parameters whose ``.grad`` is summed over ranks after every backward."""
    paths = {path for path, style in styles_of(base).items() if style == SUMMED}
    return frozenset(name for name, _ in base.named_parameters() if name.rpartition(".")[0] in paths)


def _fits(placement: Any, attribute: str) -> bool:
    """Cut into consecutive parts; a bias may also lie whole on every rank."""
    is_cut = placement.is_shard() and type(placement).__name__ != "_StridedShard"
    return is_cut or (attribute == "bias" and placement.is_replicate())
