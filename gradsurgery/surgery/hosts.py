"""What DDP, FSDP2 and ``torch.compile`` need where a method runs several backwards or fills several slots.

DDP reduces in the first backward after a forward alone; FSDP2 with gradient sync off accumulates inside itself, where
slots would mix; compiled backwards free buffers that a second one needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradsurgery.errors import PlanError
from gradsurgery.transforms.engine.hooks import is_compiled


def ddp_of(host: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper inside a host, if there is one."""
    while not isinstance(host, DistributedDataParallel):
        inner = getattr(host, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        host = inner
    return host


def check_host(host: nn.Module, slots: Iterable[str]) -> None:
    """Raise for hosts under which the slots of a method would overwrite each other."""
    for module in (host, getattr(host, "_orig_mod", host)):
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if "deepspeed" in kind.lower():
            raise PlanError(
                "DeepSpeed steps its optimizer inside backward, where no gradient or update stage can run; use FSDP2 "
                "(torch.distributed.fsdp.fully_shard) or DDP instead."
            )
        if isinstance(module, nn.DataParallel):
            raise PlanError(
                "nn.DataParallel runs replicas in threads, which share hooks; use DDP, one process per device."
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise PlanError(
                "FSDP1 flattens parameters, so none has a name or a shape; use FSDP2 (fully_shard) instead."
            )
    ddp = ddp_of(host)
    if ddp is not None and ddp.gradient_as_bucket_view and set(slots) != {"main"}:
        raise PlanError("DDP(gradient_as_bucket_view=True) lets every slot share one buffer; build it with False.")


def sync_every_backward(base: nn.Module) -> None:
    """Make FSDP2 reduce in this backward, whatever the host's accumulation asked for."""
    sync: Any = getattr(base, "set_requires_gradient_sync", None)
    if sync is not None:
        sync(True)


def reduce_again(host: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients in place over DDP's ranks, unless it accumulates (what is averaged already stays)."""
    ddp = ddp_of(host)
    if ddp is None or not ddp.require_backward_grad_sync:
        return
    ranks = dist.get_world_size(ddp.process_group)
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=ddp.process_group)
            parameter.grad.div_(ranks)


def several_backwards(host: nn.Module) -> Any:
    """A context for a forward that more than one backward follows."""
    if not is_compiled(host):
        return contextlib.nullcontext()
    return torch._functorch.config.patch(donated_buffer=False)
