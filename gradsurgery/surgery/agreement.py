"""Whether all ranks are about to do the same: one small collective before the first backward under DDP or FSDP2.

Ranks with different keys, seeds or options would average gradients that mean different things, and say nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError
from gradsurgery.surgery.hosts import ddp_of
from gradsurgery.tensors import is_sharded

if TYPE_CHECKING:
    from gradsurgery.surgery.method import Method


def require_agreement(method: Method, base: nn.Module, host: nn.Module, step: int) -> None:
    """Compare what this rank is about to do with all others that share its gradients; a collective call.

    Raises:
        PlanError: on all ranks, where models, methods (keys and seeds included) or optimizer steps differ.
    """
    groups = groups_of(base, host)
    if not groups:
        return
    parts = parts_of(method, base, step)
    digests = torch.tensor([digest(part) for part in parts.values()], device=device_of(groups[0]))
    bounds = torch.cat([digests, -digests])
    for group in groups:
        dist.all_reduce(bounds, dist.ReduceOp.MIN, group=group)
    least, most = bounds[: len(digests)], -bounds[len(digests) :]
    if found := [name for name, differs in zip(parts, (least != most).tolist(), strict=True) if differs]:
        raise PlanError(
            f"the ranks disagree on {', '.join(found)}. Give every rank the same options, seeds and key (loaded from "
            f"one file, or drawn with one seed), and resume all at one step; this one, rank {dist.get_rank()}, is at "
            f"step {step} of {method.describe()}."
        )


def groups_of(base: nn.Module, host: nn.Module) -> list[Any]:
    """The process groups over which gradients of the host are reduced; together they reach every rank."""
    ddp = ddp_of(host)
    if ddp is not None:
        return [ddp.process_group]
    sharded: Tensor | None = next((p for p in base.parameters() if is_sharded(p)), None)
    if sharded is None:
        return []
    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def parts_of(method: Method, base: nn.Module, step: int) -> dict[str, Any]:
    """What ranks may disagree on, by name; equally many on all."""
    said = method.describe()
    return {
        "the model": ParameterSpace.of(base).fingerprint,
        "the passes of the method": said["passes"],
        "its gradient stage": said.get("gradient"),
        "its update stage": said.get("update"),
        "the optimizer step": step,
    }


def digest(part: Any) -> int:
    """A positive number of 62 bits."""
    return (
        int.from_bytes(hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).digest()[:8], "big") >> 2
    )


def device_of(group: Any) -> torch.device:
    """Where tensors lie that a group can send."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else torch.device("cpu")
    )
