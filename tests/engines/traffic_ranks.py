"""What every rank of the test of traffic runs: keys and projections under FSDP2, with their collectives counted.

Started as ``python -m tests.engines.traffic_ranks <directory>``, once a rank; rank 0 writes ``result.json``: by what
was done, the collectives of every rank, and for keys the bytes of all that is swapped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gradsurgery as gs
from tests.engines.methods import CASES, batches, optimizer_of, share
from tests.engines.ranks import host_of
from tests.engines.traffic import count
from tests.keys.tiers import double, key_of
from tests.ranks import joined

PROJECTIONS = {
    "global": {"scope": "global"},
    "module": {"scope": "module", "metrics": "module"},
    "tensor, conflict": {"scope": "tensor", "remove": "conflict"},
}


def everywhere(mine: Any) -> Any:
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def keys(results: dict[str, Any]) -> None:
    for kind in ("llama", "gpt_neo"):
        for dtype in (torch.float32, torch.bfloat16):
            model = double(kind).to(dtype)
            key = key_of(kind)
            plan = key.plan(gs.dissect(model))
            host_of(model, "fsdp2")
            names = set(plan.weights.names)
            grads = {p: torch.ones_like(p) for n, p in model.named_parameters() if n in names}
            for p, grad in grads.items():
                p.grad = grad
            for what, gradients in (("weights", False), ("weights and gradients", True)):
                seen = count(lambda: key.apply_(model, gradients=gradients))  # noqa: B023
                key.unapply_(model, gradients=gradients)
                held = key.region(gs.dissect(double(kind))).numel() * dtype.itemsize * (1 + gradients)
                results[f"key, {kind}, {dtype}, {what}"] = {"seen": everywhere(seen), "swapped": held}


def projections(results: dict[str, Any]) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, options in PROJECTIONS.items():
        host, method = CASES["opposed"].start()
        (p,) = method.passes
        method = gs.Method([p], [gs.project("main", away_from="protect", **options)])  # type: ignore[arg-type]
        wrapped = host_of(host, "fsdp2")
        surgery = gs.attach(method, wrapped, optimizer_of(host))
        surgery.backward(share(batches(method)[0], rank, ranks))
        results[f"project, {name}"] = {
            "seen": everywhere(count(surgery.finish)),
            "tensors": len(list(host.parameters())),
        }
        surgery.remove()


def main(directory: str) -> None:
    results: dict[str, Any] = {}
    keys(results)
    projections(results)
    if dist.get_rank() == 0:
        Path(directory, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(*sys.argv[1:])
