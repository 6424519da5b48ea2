"""What DDP, FSDP2 and ``torch.compile`` need where a method runs several backwards or fills several slots.

DDP reduces in the first backward after a forward alone; FSDP2 with gradient sync off accumulates inside itself, where
slots would mix; compiled backwards free buffers that a second one needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.surgery.passes import Pass
from gradsurgery.tensors import is_sharded, is_tensor_parallel
from gradsurgery.transforms.engine.hooks import is_compiled
from gradsurgery.transforms.engine.styles import require_expressible


def wrappers_of(host: nn.Module) -> Iterator[nn.Module]:
    """A host, and what is wrapped inside it, the model last."""
    inner: Any = host
    while isinstance(inner, nn.Module):
        yield inner
        held = inner._modules
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        else:  # compiled; Lightning Fabric's own
            inner = held.get("_orig_mod") or held.get("_forward_module")


def ddp_of(host: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper inside a host, if there is one."""
    return next((m for m in wrappers_of(host) if isinstance(m, DistributedDataParallel)), None)


def check_host(host: nn.Module, slots: Iterable[str]) -> None:
    """Raise for hosts under which the slots of a method would overwrite each other."""
    for module in wrappers_of(host):
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
    check_model(unwrap(host))
    check_parallel(host)
    ddp = ddp_of(host)
    if ddp is not None and ddp.gradient_as_bucket_view and set(slots) != {"main"}:
        raise PlanError("DDP(gradient_as_bucket_view=True) lets every slot share one buffer; build it with False.")


def check_model(base: nn.Module) -> None:
    """Raise for models on devices, or laid out over ranks, where a method would not be what it says."""
    parameters = list(base.parameters())
    if any(parameter.device.type == "mps" for parameter in parameters):
        raise PlanError(
            "Apple's MPS has no float64, in which losses and projections are summed; train on the CPU "
            "(model.to('cpu')) or on CUDA."
        )
    gathers = any(is_fsdp(module) for module in base.modules())
    cuts = [sum(p.is_shard() for p in placements_of(parameter)) for parameter in parameters]
    parallel = (getattr(base, "tp_size", None) or 1) > 1
    if parallel and not any(cuts):
        raise PlanError(
            "tensor parallelism computes heads and neurons on the ranks that hold them, and these weights do not say "
            "which part of a whole they are, as DTensors do; update transformers, or shard the model by FSDP2 "
            "(fully_shard)."
        )
    if gathers and (parallel or max(cuts, default=0) > 1):
        raise PlanError(
            "FSDP2 over tensor-parallel ranks cuts weights twice, where a rank's part of a region is not one box; use "
            "one of the two (fully_shard over one mesh dimension, or DistributedConfig(tp_size=…) alone)."
        )


def check_parallel(host: nn.Module) -> None:
    """Raise for tensor-parallel models in which regions are not expressible, and for what has not been proven there."""
    base = unwrap(host)
    if not is_tensor_parallel(base):
        return
    if ddp_of(host) is not None:
        raise PlanError(
            "DDP around a tensor-parallel model averages parts of weights as if each were all of one; give every rank "
            "the same rows without DDP, or shard the model by FSDP2 (fully_shard)."
        )
    if is_compiled(host):
        raise PlanError(
            "tensor-parallel layers under surgery pick rows by their labels, which a compiled graph of them cannot; "
            "leave the model uncompiled, or shard it by FSDP2 (fully_shard)."
        )
    adapted = type(base).__name__ == "Adapted" or any(hasattr(m, "base_layer") for m in base.modules())
    if adapted:
        raise PlanError(
            "an adapter adds up whole inputs and outputs of layers, and a rank of a tensor-parallel model has parts of "
            "one or the other; shard the model by FSDP2 (fully_shard), or use DDP."
        )
    require_expressible(base)


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    return any(parent.__name__ == "FSDPModule" for parent in type(module).__mro__)


def placements_of(tensor: Any) -> tuple[Any, ...]:
    return tensor.placements if is_sharded(tensor) else ()


def check_backward(backward: Any, num_items: Any) -> None:
    """Raise where micro-batches would be divided twice: by their window's items, and by their number."""
    steps = getattr(getattr(backward, "__self__", None), "gradient_accumulation_steps", 1)
    if num_items is not None and isinstance(steps, int) and steps > 1:
        raise PlanError(
            f"num_items makes micro-batches add up to their window, and this backward divides each by "
            f"gradient_accumulation_steps={steps} again: give an Accelerator without that option, and put "
            f"accelerator.no_sync(model) around all but the last."
        )


def recover(base: nn.Module) -> None:
    """After a forward or backward that was cut short: FSDP2 forgets that it is under way, and what it holds unreduced
    (torch 2.13 can; before, weights that it had gathered stay so)."""
    if is_fsdp(base):
        reset = getattr(base, "reset_iter_state", None)
        if reset is not None:
            reset()
        return
    for child in base.children():
        recover(child)


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


class Buffers:
    """Compiled backwards give away their forward's buffers, which a second one through it needs: not while this holds.

    The setting is torch's own, for the whole process; who lets go last brings it back. Graphs from before are dropped:
    nothing tells those that keep their buffers from those that do not, and none is compiled anew because of it.
    """

    def __init__(self) -> None:
        self._release: weakref.finalize[Any, Any] | None = None

    def hold(self, host: nn.Module) -> None:
        """Hold them, if the host is compiled; for good, until `release` or the end of this object."""
        if self._release is not None or not is_compiled(host):
            return
        if not _held:
            _held.append(torch._functorch.config.donated_buffer)
        _held.append(True)
        torch._functorch.config.donated_buffer = False
        torch.compiler.reset()
        self._release = weakref.finalize(self, _let_go)

    def release(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None


_held: list[bool] = []  # what the setting was, and one entry for each who holds it


def _let_go() -> None:
    _held.pop()
    if len(_held) == 1:
        torch._functorch.config.donated_buffer = _held.pop()


def has_several_backwards(p: Pass) -> bool:
    """Whether more than one backward goes through a forward of the pass."""
    return sum(getattr(loss, "backwards", 1) for loss in p.losses.values()) > 1
