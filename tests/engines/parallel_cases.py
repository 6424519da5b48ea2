"""Tiny models cut over ranks by transformers' own plans, or by torch's, and the methods that run on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradsurgery as gs
from gradsurgery.tensors import is_tensor_parallel
from tests.engines.equality import Weights
from tests.engines.methods import CASES, TASKS, batches, optimizer_of, share
from tests.keys.tiers import double, key_of
from tests.surgery import tiny
from tests.surgery.tiny import anatomy, forget_of, sgtm

SIZES = {name: size for name, size in tiny.CONFIGS["llama"].items() if name != "num_key_value_heads"}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {**SIZES, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "qwen2": {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "phi3": {**SIZES, "num_key_value_heads": 2},
    "qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 6},
}
"""Biases on both sides and q, k, v interleaved; tied tables and biases of q, k, v; fused matrices that are gathered;
norms of single heads."""
Make = Callable[[Any], tuple[Any, gs.Method]]
m = gs.methods


def on(kind: str, make: Callable[[], gs.Method]) -> tuple[str, Make]:
    return kind, lambda model: (model, make())


def routed(kind: str, strategy: Any) -> gs.Method:
    """SGTM with gradients scaled beside it, a clip and a freeze."""
    found = anatomy(kind)
    norms: Any = "joint" if kind == "qwen3" else "retain"
    method = m.sgtm(found, forget_of(kind), strategy=strategy, embeddings="retain", norms=norms)
    (p,) = method.passes
    frozen = found.heads[0, 1:3] | (found.region("*.q_norm.*") if kind == "qwen3" else found.neurons[1, :2])
    under = [*p.under, gs.scale(found.neurons[:, 2:9], -0.75)]
    return gs.Method([gs.Pass("p", under=under)], [gs.clip(0.7)], [gs.freeze(frozen)])


METHODS: dict[str, tuple[str, Make]] = {
    **{name: (case.kind, case.make) for name, case in CASES.items() if case.kind == "llama"},
    # those that the registry has for an architecture whose attention cannot be cut
    "sgtm, mask, projections joint": on("llama", lambda: m.sgtm(anatomy(), forget_of(), joint=["mlp_projection"])),
    "sgtm, detach": on("llama", lambda: sgtm("llama", "detach")),
    "sgtm, zero": on("llama", lambda: sgtm("llama", "zero")),
    "tiered, in C2": on("llama", lambda: m.tiered(key_of("llama"), anatomy(), step_in="C2")),
    **{
        f"{kind}, {strategy}": on(kind, lambda k=kind, s=strategy: routed(k, s))  # type: ignore[misc]
        for kind in FAMILIES
        for strategy in ("mask", "detach", "zero")
    },
    **{f"{kind}, plain": on(kind, m.plain) for kind in FAMILIES},
    "qwen3, pcgrad": on("qwen3", lambda: m.pcgrad(TASKS, seed=1)),
}
QUICKLY = [name for name, case in CASES.items() if case.quick]
QUICKLY += ["gpt_neox, plain", "gpt_neox, detach", "qwen3, plain", "qwen3, pcgrad"]


def add_families() -> None:
    """Let the tiny models be of these families too, and of one whose plan is refused; in a process of their own."""
    tiny.CONFIGS.update(FAMILIES)
    tiny.CONFIGS["mixtral"] = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 2}


def cut(directory: str, kind: str) -> Any:
    """The tiny double model, loaded over all ranks by its family's plan."""
    from transformers.distributed import DistributedConfig

    path = Path(directory, kind)
    if dist.get_rank() == 0 and not path.exists():
        double(kind).save_pretrained(path)
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, distributed_config=config)
    return model.train()


def torch_plan(model: Any, mesh: Any = None) -> Any:
    """A Llama cut in place by `torch.distributed.tensor.parallel.parallelize_module`."""
    outputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    inputs = ("self_attn.o_proj", "mlp.down_proj")
    for layer in model.model.layers:
        plan: dict[str, Any] = {**{n: ColwiseParallel() for n in outputs}, **{n: RowwiseParallel() for n in inputs}}
        parallelize_module(layer, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    return model


def stepped(model: Any, make: Make, micro: int = 1) -> Weights:
    """All weights after three AdamW steps, each on a whole batch in micro-batches."""
    host, method = make(model)
    optimizer = optimizer_of(host)
    with gs.attach(method, host, optimizer) as surgery:
        for whole in batches(method):
            parts = [share(whole, k, micro) for k in range(micro)]
            items = surgery.count_items(parts, average=is_tensor_parallel(model))  # one process runs on one rank
            for part in parts:
                surgery.backward(part, num_items=items)
            optimizer.step()
            optimizer.zero_grad()
    return gathered(dict(host.named_parameters()))


def gathered(tensors: Mapping[str, Tensor | None]) -> Weights:
    """Copies of whole tensors, also of those that lie on several ranks."""
    out: Weights = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            held: Any = tensor.detach()
            out[name] = (held.full_tensor() if hasattr(held, "full_tensor") else held).clone()
    return out
