"""What every rank of a test of projections runs: steps on its rows, against one process on the whole batch.

Started as ``python -m tests.engines.projection_ranks <hosts> <methods> <seeds> <directory>``, once a rank; rank 0
writes ``result.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import gradsurgery as gs
from gradsurgery.surgery.slots import Slots
from gradsurgery.tensors import local_of
from gradsurgery.transforms.stages import StepContext
from tests.engines.ranks import full, host_of
from tests.ranks import joined
from tests.surgery.tiny import anatomy, batch, build, cut, gap
from tests.transforms.vectors import SHAPES, Holder, draw

ROWS, STEPS = 8, 3


def size(outputs: Any, rows: Any, refs: Any) -> Tensor:
    counted = rows["labels"][:, 1:] != -100
    squares = outputs.logits[:, :-1].float().square().mean(-1)
    return squares.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def both(**more: Any) -> gs.Pass:
    return gs.Pass("both", {"ce": gs.losses.causal_lm, "size": size}, into={"ce": "main", "size": "protect"}, **more)


def methods() -> dict[str, gs.Method]:
    """Sign gates, all scopes, parts of tensors, updates, running means, kept slots, several tasks."""
    part = anatomy().neurons[:, :9] | anatomy().kv_groups[:, :1]
    tasks = [gs.Pass("a"), gs.Pass("b", rows="forget", into="b"), gs.Pass("c", size, rows="retain", into="c")]
    kept = [gs.Pass("p"), gs.Pass("kept", size, into="protect", when=gs.every(2), keep=2)]
    metrics: Any = "module"
    return {
        "conflict": gs.Method([both()], gradient=[gs.project(remove="conflict", metrics=metrics), gs.clip(0.5)]),
        "rows": gs.Method([both()], gradient=[gs.project(scope="row", metrics=metrics, park="parked")]),
        "tensors": gs.Method([both()], gradient=[gs.project(scope="tensor", remove="agreement", region=part)]),
        "rows of a part": gs.Method([both()], gradient=[gs.project(scope="row", region=part)]),
        "frozen": gs.Method([both()], gradient=[gs.project()], update=[gs.freeze(part)]),
        "update": gs.Method([both()], update=[gs.project(at="update"), gs.leak(), gs.changed_fraction()]),
        "update of rows": gs.Method([both()], update=[gs.project(at="update", scope="row"), gs.leak()]),
        "update of a part": gs.Method([both()], update=[gs.project(at="update", region=part)]),
        "mean": gs.Method([both()], gradient=[gs.ema("protect", 0.5), gs.project()]),
        "kept": gs.Method(kept, gradient=[gs.project()]),
        "several": gs.Method(tasks, gradient=[gs.project(away_from=["b", "c"], remove="conflict")]),
        "pcgrad": gs.Method(tasks, gradient=[gs.aggregate(gs.PCGrad(1))]),
        "mgda": gs.Method(tasks, gradient=[gs.aggregate("mgda")]),
        "stock": gs.Method([both()]),
    }


def train(method: gs.Method, host: str, micro: int = 1, resume: bool = False) -> tuple[dict[str, Tensor], Any, Any]:
    """Weights after some steps with momentum and decay, the last metrics, and the last cosine of delta and slot."""
    model = build()
    ranks, rank = (1, 0) if host == "one" else (dist.get_world_size(), dist.get_rank())
    wrapped = host_of(model, host)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    surgery = gs.attach(method, wrapped, optimizer)
    each = ROWS // ranks
    cosine = 0.0
    for k in range(STEPS):
        mine = cut(batch(ROWS, seed=k), rank * each, (rank + 1) * each)
        parts = [cut(mine, j * each // micro, (j + 1) * each // micro) for j in range(micro)]
        items = surgery.count_items(parts, average=host != "one")
        for part in parts:
            surgery.backward(part, num_items=items)
        before = full(model)
        r = {n: whole(g) for n, g in surgery.slots["protect"].items()} if "protect" in surgery.slots else {}
        optimizer.step()
        after = full(model)
        if r:
            x = torch.cat([(after[n].double() - before[n].double()).reshape(-1) for n in r])
            y = torch.cat([g.double().reshape(-1) for g in r.values()])
            cosine = float(x @ y / x.norm() / y.norm())
        optimizer.zero_grad()
        if resume and k == 1:
            state = surgery.state_dict()
            surgery.remove()
            surgery = gs.attach(method, wrapped, optimizer)
            surgery.load_state_dict(state)
    metrics = surgery.metrics()
    surgery.remove()
    return full(model), metrics, cosine


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def examine_host(host: str, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    chosen = {name: method for name, method in methods().items() if not names or name in names}
    for name, method in chosen.items():
        one, alone, _ = train(method, "one")
        many, shared, cosine = train(method, host)
        apart = max((abs(shared[k] - alone[k]) for k in alone if not k.startswith("loss")), default=0.0)
        again = gap(train(method, host, micro=2)[0], one)
        results[name] = {"gap": gap(many, one), "micro": again, "metrics": apart, "cosine": cosine}
        results[name]["moved"] = gap(one, full(build()))
    for name in {"mean", "kept"} & chosen.keys():
        results[name]["resumed"] = gap(train(methods()[name], host, resume=True)[0], train(methods()[name], host)[0])
    return results


PLACED: dict[str, dict[str, Any]] = {
    "rows": {name: Shard(0) for name, shape in SHAPES.items() if shape},
    "columns": {name: Shard(1) for name, shape in SHAPES.items() if len(shape) > 1},
    "last": {name: Shard(len(shape) - 1) for name, shape in SHAPES.items() if shape},
    "mixed": {"a.weight": Shard(0), "b.experts": Shard(2), "a.bias": Shard(0)},
}


def examine_placements(seeds: int) -> dict[str, Any]:
    """Gradients dealt out over ranks in every way (others replicated, or plain) against plain ones."""
    results: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, zero = Holder(), [0] * len(SHAPES)
    region = gs.region(model, "a.*") | gs.region(model, "c.weight")
    plans: dict[str, Any] = {f"{s} {m}": gs.project(scope=s, remove=m, metrics="module") for s in
                             ("global", "module", "tensor", "row") for m in ("both", "conflict")}  # fmt: skip
    plans["region"] = gs.project(region=region)
    plans["several"] = gs.project(away_from=["protect", "second"])
    plans["several rows"] = gs.project(away_from=["protect", "second"], scope="row")
    plans["mgda"] = gs.aggregate("mgda")
    for placed, placements in PLACED.items():
        for plan, transform in plans.items():
            for seed in range(seeds):
                given = {s: draw(10 * seed + k, [seed] * len(zero), torch.float32) for k, s in
                         enumerate(("main", "protect", "second"))}  # fmt: skip
                found = []
                for spread in (False, True):
                    model = Holder()
                    slots = Slots()
                    for slot, grads in given.items():
                        held = {n: g.clone() for n, g in grads.items()}
                        if spread:
                            held = {n: distribute_tensor(g, mesh, [placements.get(n, Replicate())]) if n != "b.scale"
                                    else g for n, g in held.items()}  # fmt: skip
                        if slot == "main":
                            put(model, held)
                        else:
                            slots.put(slot, held)
                    context = StepContext.of(model, slots=slots)
                    transform.apply(context, transform.init(None))
                    found.append(({n: whole(p.grad) for n, p in model.named_parameters()}, context.metrics))
                (plain, alone), (shared, told) = found
                scale = max(float(g.abs().max()) for g in plain.values())
                apart = max(abs(float(alone[k]) - float(told[k])) for k in alone)
                old = results.get(f"{placed}, {plan}", (0.0, 0.0))
                results[f"{placed}, {plan}"] = (max(old[0], gap(plain, shared) / scale), max(old[1], apart))
    return results


def put(model: nn.Module, held: dict[str, Any]) -> None:
    """Parameters laid out as the gradients, which they get."""
    for name, grad in held.items():
        module, own = name.split(".")
        parameter = nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad
        setattr(getattr(model, module), own, parameter)


def examine_nan() -> str:
    """A nan that lies on one rank is an error on all of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    said = []
    for scope in ("global", "row"):
        model, slots = Holder(), Slots()
        held = {n: distribute_tensor(g, mesh, [Shard(0)]) if g.dim() else g for n, g in
                draw(0, [0] * len(SHAPES), torch.float32).items()}  # fmt: skip
        if dist.get_rank() == 1:
            local_of(held["a.weight"]).fill_(torch.nan)
        put(model, held)
        slots.put("protect", {n: torch.ones_like(g) for n, g in held.items()})
        transform: Any = gs.project(scope=scope)  # type: ignore[arg-type]
        try:
            transform.apply(StepContext.of(model, slots=slots), transform.init(None))
        except gs.errors.SlotError as error:
            said.append(str(error))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)
    return json.dumps(everywhere)


def main(hosts: str, names: str, seeds: str, directory: str) -> None:
    chosen = [name for name in names.split(",") if name]
    results: dict[str, Any] = {host: examine_host(host, chosen) for host in hosts.split(",") if host}
    results["placements"] = examine_placements(int(seeds))
    results["nan"] = examine_nan()
    if dist.get_rank() == 0:
        Path(directory, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(*sys.argv[1:])
