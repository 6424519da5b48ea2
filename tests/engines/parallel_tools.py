"""Tools of the library on a model that may lie cut on ranks: each gives tensors that must not depend on that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import gradsurgery as gs
from gradsurgery.anatomy.entries import Entries
from gradsurgery.transforms.engine.parallel import local_entries
from tests.engines.equality import Weights
from tests.engines.methods import batches, optimizer_of
from tests.engines.parallel_cases import FAMILIES, METHODS, gathered, stepped
from tests.keys.tiers import key_of
from tests.surgery.tiny import anatomy, batch, forget_of, sgtm


def inputs(data: dict[str, Tensor]) -> dict[str, Any]:
    return {**{name: data[name] for name in ("input_ids", "attention_mask", "labels")}, "use_cache": False}


def gradients(model: Any, *transforms: Any) -> Weights:
    """Logits and gradients of one batch under some transforms, and logits without a graph."""
    data = batch(8)
    model.zero_grad()
    with gs.applied(model, *transforms, columns={"forget": data["forget"]}):
        outputs = model(**inputs(data))
        outputs.loss.backward()
        with torch.no_grad():
            again = model(**inputs(data)).logits
    grads = gathered({name: p.grad for name, p in model.named_parameters()})
    return {"logits": outputs.logits.detach(), "again": again, **grads}


def zeroed(kind: str, model: Any) -> Weights:
    return gradients(model, gs.zero(forget_of(kind), where="forget"))


def keyed(model: Any) -> Weights:
    """Weights and gradients under a key, and after it."""
    gradients(model)
    out: Weights = {}
    for name in ("apply_", "unapply_"):
        getattr(key_of("llama"), name)(model, gradients=True)
        out |= {f"{name}/{n}": w for n, w in gathered(dict(model.named_parameters())).items()}
        out |= {f"{name}/{n}/grad": g for n, g in gathered({n: p.grad for n, p in model.named_parameters()}).items()}
    return out


def ablated(model: Any, reinit: Any) -> Weights:
    gs.ablate_(model, forget_of(), reinit=reinit, generator=torch.Generator().manual_seed(3))
    return gathered(dict(model.named_parameters()))


def remembered(model: Any) -> Weights:
    found = gs.estimators.gradient_memory(model, [batch(4, seed=52)], count=2)
    return {f"{k}/{n}": v for k, vector in enumerate(found.vectors) for n, v in gathered(vector).items()}


def checkpointed(model: Any) -> Weights:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return stepped(model, METHODS["sgtm, zero"][1])


def own_loop(kind: str, model: Any) -> Weights:
    """Forwards and backwards of one's own, two a step; norms are measured, clipped and logged."""
    edit = gs.zero if kind == "qwen3" else gs.mask
    p = gs.Pass("p", under=[edit(forget_of(kind), where="forget")])
    method = gs.Method([p], [gs.clip(0.3)], [gs.freeze(anatomy(kind).neurons[:, :4])])
    optimizer = optimizer_of(model)
    with gs.attach(method, model, optimizer) as surgery:
        surgery.track(forget=forget_of(kind))
        for data in batches(method):
            for rows in (slice(0, 2), slice(2, None)):
                part = {name: value[rows] for name, value in data.items()}
                with surgery.running("train", part):
                    model(**inputs(part)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        norms = {name: torch.tensor(value).float() for name, value in surgery.metrics().items()}
    return {**gathered(dict(model.named_parameters())), **norms}


def resumed(model: Any) -> Weights:
    """A surgery of its own for each step, which goes on where the one before stopped."""
    host, method = METHODS["gru"][1](model)
    optimizer, state = optimizer_of(host), None
    for data in batches(method):
        with gs.attach(method, host, optimizer) as surgery:
            if state is not None:
                surgery.load_state_dict(state)
            surgery.backward(data)
            optimizer.step()
            optimizer.zero_grad()
            state = surgery.state_dict()
    return gathered(dict(host.named_parameters()))


def dry(model: Any) -> Weights:
    return {name: mask.double() for name, mask in sgtm("llama").dry_run(model, batch(8)).masks.items()}


def dissected(model: Any) -> Weights:
    """Every unit that is found, as what belongs to it."""
    found = gs.dissect(model)
    assert found == anatomy({"LlamaForCausalLM": "llama", "GPTNeoXForCausalLM": "gpt_neox"}[found.space.model])
    return {name: entries.mask().double() for name, entries in found.heads.entries.items()}


def on(kind: str, run: Callable[[Any], Weights]) -> tuple[str, Callable[[Any], Weights]]:
    return kind, run


TOOLS: dict[str, tuple[str, Callable[[Any], Weights]]] = {
    "mask": on("llama", lambda model: gradients(model, gs.mask(forget_of(), where="forget"))),
    "detach and scale": on(
        "llama",
        lambda model: gradients(
            model, gs.detach(forget_of(), where="forget"), gs.scale(gs.region(model, "model.layers.*"), 2.5)
        ),
    ),
    **{f"zero in {kind}": on(kind, functools.partial(zeroed, kind)) for kind in ("llama", *FAMILIES)},
    "key": on("llama", keyed),
    "ablate, zero": on("llama", lambda model: ablated(model, "zero")),
    "ablate, normal": on("llama", lambda model: ablated(model, "normal")),
    "gradient memory": on("llama", remembered),
    "micro-batches": on("llama", lambda model: stepped(model, METHODS["opposed"][1], 2)),
    "micro-batches and slots": on("qwen3", lambda model: stepped(model, METHODS["qwen3, pcgrad"][1], 2)),
    "checkpointing": on("llama", checkpointed),
    "a loop of one's own": on("llama", functools.partial(own_loop, "llama")),
    "a loop of one's own, norms of heads": on("qwen3", functools.partial(own_loop, "qwen3")),
    "resumed": on("llama", resumed),
    "dry run": on("llama", dry),
    "dissect": on("llama", dissected),
    "dissect fused": on("gpt_neox", dissected),
}


QUICK_TOOLS = [name for name, (kind, _) in TOOLS.items() if kind not in ("qwen2", "phi3")]


def entries_that_differ(draws: int = 200) -> int:
    """Random sets of entries, of which this rank's part is not the part of their mask that torch gives it."""
    mesh, random = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(dist.get_rank())
    wrong = 0
    for _ in range(draws):
        shape = tuple(torch.randint(1, 9, (2,), generator=random).tolist())
        entries = Entries.empty(shape)
        for _ in range(3):
            kept = [torch.rand(n, generator=random).lt(0.4).nonzero().flatten().numpy() for n in shape]
            entries = entries | Entries.box(shape, dict(enumerate(kept)))
        dim = int(torch.randint(2, (1,), generator=random))
        laid_out = distribute_tensor(torch.empty(shape), mesh, [Shard(dim)], src_data_rank=None)
        mine = distribute_tensor(entries.mask(), mesh, [Shard(dim)], src_data_rank=None).to_local()
        wrong += not torch.equal(local_entries(entries, laid_out).mask(), mine)
    return wrong
