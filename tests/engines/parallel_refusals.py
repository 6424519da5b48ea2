"""What is refused on models that lie cut on ranks: each function must raise, on every rank, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, SequenceParallel, parallelize_module

import gradsurgery as gs
from tests.engines.methods import basis, optimizer_of
from tests.engines.parallel_cases import cut, torch_plan
from tests.keys.tiers import double, key_of
from tests.surgery.tiny import anatomy, batch, forget_of

m = gs.methods


def attach(model: nn.Module, method: gs.Method | None = None) -> None:
    gs.attach(method or m.plain(), model).remove()


def around(model: Any, wrap: Callable[[Any], nn.Module]) -> None:
    attach(wrap(model))


def first_backward(directory: str, seeds: Callable[[int], tuple[int, int]]) -> None:
    """A step in which the ranks have keys and rows of these seeds; nothing may have gradients after it."""
    model = cut(directory, "llama")
    of_key, of_rows = seeds(dist.get_rank())
    with gs.attach(m.tiered(key_of("llama", of_key), anatomy()), model, optimizer_of(model)) as surgery:
        try:
            surgery.backward(batch(4, seed=of_rows))
        finally:
            assert all(p.grad is None for p in model.parameters())


def table_by_torch() -> nn.Module:
    model = double("llama")
    plan = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model.model, init_device_mesh("cpu", (dist.get_world_size(),)), {"embed_tokens": plan})
    return model


def tokens_dealt_out() -> nn.Module:
    model = torch_plan(double("llama"))
    parallelize_module(model.model, init_device_mesh("cpu", (dist.get_world_size(),)), {"norm": SequenceParallel()})
    return model


def sharded_twice() -> nn.Module:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    return fully_shard(torch_plan(double("llama"), mesh["tensor"]), mesh=mesh["data"])


def with_peft(model: Any) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def without_sync(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, init_sync=False)  # which torch cannot, for parts of weights


def applied(model: nn.Module, *transforms: Any) -> None:
    with gs.applied(model, *transforms):
        pass


REFUSALS: dict[str, Callable[[str], Any]] = {
    "experts": lambda at: attach(cut(at, "mixtral")),
    "experts, applied": lambda at: applied(cut(at, "mixtral"), gs.mask(anatomy("mixtral").heads[:, 0])),
    "experts, ablated": lambda at: gs.ablate_(model := cut(at, "mixtral"), gs.dissect(model).neurons[:, -3:]),
    "norms of heads": lambda at: attach(cut(at, "qwen3"), m.sgtm(anatomy("qwen3"), forget_of("qwen3"), norms="retain")),
    "a table by torch": lambda at: attach(table_by_torch()),
    "tokens dealt out": lambda at: attach(tokens_dealt_out()),
    "FSDP2": lambda at: attach(sharded_twice()),
    "DDP": lambda at: around(torch_plan(double("llama")), without_sync),
    "compile": lambda at: around(cut(at, "llama"), lambda model: torch.compile(model, backend="eager")),  # type: ignore[arg-type, return-value]
    "adapter": lambda at: gs.adapters.add(cut(at, "llama")),
    "peft": lambda at: around(cut(at, "llama"), with_peft),
    "prune": lambda at: gs.prune_(cut(at, "llama"), forget_of()),
    "activations": lambda at: attach(
        cut(at, "llama"), m.rmu("model.layers.1.mlp.gate_proj", gs.region(double("llama"), "*gate_proj*"))
    ),
    "basis": lambda at: gs.estimators.activation_basis(cut(at, "llama"), [batch()], "mlp"),
    "importance": lambda at: gs.estimators.importance(cut(at, "llama"), basis(), [batch()]),
    "other rows": lambda at: first_backward(at, lambda rank: (0, rank)),
    "another key": lambda at: first_backward(at, lambda rank: (rank, 0)),
}
