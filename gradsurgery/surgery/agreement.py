"""Whether all ranks are about to do the same: one small collective before the first backward under DDP or FSDP2.

Ranks with different keys, seeds or options would average gradients that mean different things, and say nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.estimators.data import DataDigest
from gradsurgery.surgery.hosts import ddp_of
from gradsurgery.tensors import is_sharded, is_tensor_parallel

if TYPE_CHECKING:
    from gradsurgery.surgery.method import Method


def require_agreement(
    method: Method, base: nn.Module, host: nn.Module, step: int, batch: Mapping[str, Any] | None = None
) -> None:
    """Compare what this rank is about to do with all others that share its gradients; a collective call.

    Raises:
        PlanError: on all ranks, where models, methods (keys and seeds included) or optimizer steps differ; for a
            tensor-parallel model also where batches do.
    """
    groups = groups_of(base, host)
    if not groups:
        return
    parts = parts_of(method, base, step)
    if is_tensor_parallel(base):
        parts["the batch, which all ranks of a tensor-parallel model must be given alike"] = digest_of(batch or {})
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


@contextmanager
def failing_together(base: nn.Module, host: nn.Module, what: str, always: bool = False) -> Iterator[None]:
    """What fails in the block on one rank fails on all that share its gradients, instead of leaving them to wait.

    A collective call on the CPU. On other devices it would make the host wait for them, so that it is one only with
    ``always``.

    Raises:
        BatchError: it failed on another rank alone.
    """
    groups = groups_of(base, host)
    if not groups or not (always or device_of(groups[0]).type == "cpu"):
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    first = torch.tensor(dist.get_world_size() if failed is None else dist.get_rank(), device=device_of(groups[0]))
    for group in groups:
        dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    if (where := int(first)) == dist.get_world_size():
        return
    text = torch.zeros(1000, dtype=torch.int32, device=first.device)
    if where == dist.get_rank():
        said = f"{type(failed).__name__}: {failed}".encode()[: len(text)]
        text[: len(said)] = torch.tensor(list(said), dtype=torch.int32)
    for group in groups:
        dist.all_reduce(text, dist.ReduceOp.MAX, group=group)
    if failed is not None:
        try:
            raise failed
        finally:
            del failed  # its traceback holds this frame, and all that the pass made
    said = bytes(text[text > 0].tolist())
    raise BatchError(f"{what} failed on rank {where}, {said.decode(errors='ignore')}")


def groups_of(base: nn.Module, host: nn.Module) -> list[Any]:
    """The process groups over which gradients of the host are reduced; together they reach every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
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


def digest_of(batch: Mapping[str, Any]) -> str:
    """A fingerprint of a batch and its sub-batches."""
    digest = DataDigest()
    for number, part in enumerate([batch, *(v for _, v in sorted(batch.items()) if isinstance(v, Mapping))]):
        digest.add(part, number)
    return digest.hexdigest()


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
