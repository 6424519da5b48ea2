"""What every rank of a distributed test runs: three steps on its rows, against one process on the whole batch.

Started as ``python -m tests.engines.ranks <host> <directory>``, once a rank; rank 0 writes ``result.json``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gradsurgery as gs
from tests.ranks import joined
from tests.surgery.tiny import batch, build, cut, gap, sgtm

ROWS, STEPS = 8, 3


def whole_batches() -> list[dict[str, Tensor]]:
    """Mixed labels that differ by rank: in step 0 the first rank's rows have no flag, in step 2 all are forget rows."""
    out = [batch(ROWS, seed=k) for k in range(STEPS)]
    for name in ("forget", "retain"):
        out[0][name][: ROWS // 2] = False
    out[2]["forget"][: ROWS // 2], out[2]["retain"][: ROWS // 2] = True, False
    return out


def host_of(model: Any, host: str) -> Any:
    if host == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if host == "fsdp2":
        for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
            fully_shard(block)
        fully_shard(model)
    return model


def full(model: nn.Module) -> dict[str, Tensor]:
    named = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in named.items()}


def train(
    kind: str, method: gs.Method | None, host: str, micro: int = 1, first: bool = False, checkpointing: bool = False
) -> tuple[dict[str, Tensor], Any]:
    """Weights after three AdamW steps; on all ranks' rows where ``host`` is ``"one"``, else on this rank's."""
    model = build(kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ranks, rank = (1, 0) if host == "one" else (dist.get_world_size(), dist.get_rank())
    surgery = gs.attach(method, model) if method is not None and first else None
    wrapped = host_of(model, host)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if method is not None:
        surgery = surgery or gs.attach(method, wrapped)
        surgery.model = wrapped
        surgery.bind(optimizer)
    each = ROWS // ranks
    metrics = {}
    for whole in whole_batches():
        mine = cut(whole, rank * each, (rank + 1) * each)
        parts = [cut(mine, k * each // micro, (k + 1) * each // micro) for k in range(micro)]
        if surgery is not None:
            items = surgery.count_items(parts, average=host != "one")
            for part in parts:
                surgery.backward(part, num_items=items)
        else:
            tokens = (whole["labels"][:, 1:] != -100).sum() / ranks
            for part in parts:
                logits = wrapped(
                    input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False
                ).logits
                gs.losses.causal_lm(type("", (), {"logits": logits}), part, {}).mul(
                    (part["labels"][:, 1:] != -100).sum() / tokens
                ).backward()
        optimizer.step()
        optimizer.zero_grad()
    if surgery is not None:
        metrics = surgery.metrics()
        surgery.remove()
    return full(model), metrics


def squared(outputs: Any, rows: Any, refs: Any) -> Tensor:
    return 2.0 * gs.losses.causal_lm(outputs, rows, refs)


SLOTS = {
    "one forward": [gs.Pass("p", {"a": gs.losses.causal_lm, "b": squared}, into={"a": "main", "b": "second"})],
    "two passes": [gs.Pass("p"), gs.Pass("q", squared, into="second", rows="forget")],
}


def slots(passes: list[gs.Pass], host: str, micro: int = 2) -> dict[str, Tensor]:
    """Both slots after one window, the ranks' rows in two micro-batches."""
    model, whole = build(), batch(ROWS)
    ranks, rank = (1, 0) if host == "one" else (dist.get_world_size(), dist.get_rank())
    each = ROWS // ranks
    wrapped = host_of(model, host)
    with gs.attach(gs.Method(passes), wrapped) as surgery:
        mine = cut(whole, rank * each, (rank + 1) * each)
        parts = [cut(mine, k * each // micro, (k + 1) * each // micro) for k in range(micro)]
        items = surgery.count_items(parts, average=host != "one")
        for k, part in enumerate(parts):
            if host == "fsdp2":
                model.set_requires_gradient_sync(k + 1 == micro)  # what a host asks for that accumulates
            skip = host == "ddp" and k + 1 < micro
            with wrapped.no_sync() if skip else contextlib.nullcontext():
                surgery.backward(part, num_items=items)
        found = {f"main/{n}": p.grad for n, p in model.named_parameters()}
        found |= {f"second/{n}": g for n, g in surgery.slots["second"].items()}
        return {
            n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in found.items() if g is not None
        }


def main(host: str, directory: str) -> None:
    results: dict[str, Any] = {}
    for kind in ("llama", "gpt_neo"):
        stock = gap(train(kind, None, host)[0], train(kind, None, "one")[0])
        results[f"{kind}/stock"] = {"gap": stock}
        for strategy in ("mask", "detach", "zero"):
            method = sgtm(kind, strategy)
            one, alone = train(kind, method, "one")
            many, shared = train(kind, method, host)
            norms = [alone["grad_norm"], shared["grad_norm"]]
            results[f"{kind}/{strategy}"] = {
                "gap": gap(many, one),
                "norms": norms,
                "moved": gap(one, full(build(kind))),
            }
        results[f"{kind}/micro"] = {"gap": gap(train(kind, method, host, micro=2)[0], one)}
        scaled = gs.region(build(kind), "*norm*" if kind == "llama" else "*ln_*")
        (p,) = method.passes
        method = gs.Method([gs.Pass("p", under=[*p.under, gs.scale(scaled, -0.75)])], method.gradient, method.update)
        one = train(kind, method, "one")[0]
        results[f"{kind}/checkpointing"] = {"gap": gap(train(kind, method, host, checkpointing=True)[0], one)}
        results[f"{kind}/first"] = {"gap": gap(train(kind, method, host, first=True)[0], one)}
    for name, passes in SLOTS.items():
        results[f"slots/{name}"] = {"gap": gap(slots(passes, host), slots(passes, "one"))}
    if dist.get_rank() == 0:
        Path(directory, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(sys.argv[1], sys.argv[2])
