"""Two ranks: methods of projected gradients end where one process with the same micro-batches does.

Started as ``python -m tests.methods.projection_ranks <ddp | fsdp2> <directory>``, once a rank; rank 0 writes
``result.json``.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradsurgery as gs
from gradsurgery.estimators import GradientMemory
from tests.methods.hand import Batch, batch, build
from tests.methods.test_projection_methods import CASES, OPTIMIZERS, STEPS, window
from tests.ranks import joined

DRAWS: dict[str, dict[str, Any]] = {
    "opposed": {"remove": "both", "scope": "tensor", "at": "gradient", "padding": False, "rows": "forget"},
    "opposed at update": {"remove": "conflict", "scope": "global", "at": "update", "padding": False, "rows": None},
    "safegrad": {"remove": "conflict", "scope": "row", "alignment_weight": 0.3},
    "ogpsa": {"every": 2, "references": ["general", "code"], "scope": "module", "remove": "both"},
    "gru": {"decay": 0.2, "max_cosine": 0.05, "npo": True, "retain_weight": 0.7, "by": "rows", "remove": "conflict"},
    "pcgrad": {"tasks": 3, "weight": 0.5, "seed": 1},
}
DRAWS["opposed"] |= {"positive_weight": 1.0, "unlearn_weight": 1.5}
DRAWS["opposed at update"] |= {"positive_weight": 1.0, "unlearn_weight": 1.0}
DRAWS["gru"]["scope"] = "global"


def hosted(model: Any, host: str) -> Any:
    if host == "ddp":
        return DistributedDataParallel(model)
    for layer in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
        fully_shard(layer)
    return fully_shard(model)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(model: Any, start: Any, name: str, windows: list[list[Batch]], alone: bool) -> dict[str, Tensor]:
    """Parameters after some steps."""
    base = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = OPTIMIZERS["adamw"](list(base.parameters()))
    with gs.attach(CASES[name.split()[0]].make(start, DRAWS[name]), model, optimizer) as surgery:
        for batches in windows:
            items = surgery.count_items(batches, average=not alone)
            for one in batches:
                surgery.backward(one, num_items=items)
            optimizer.step()
            optimizer.zero_grad()
    return {n: whole(p.detach()).clone() for n, p in base.named_parameters()}


def memories(host: str, directory: Path) -> float:
    """A memory of a sharded model, through a file, against one of the plain model."""
    start = build("opt")
    plain = gs.estimators.gradient_memory(start, [batch(3, 0)], 3)
    model = hosted(copy.deepcopy(start), host)
    gs.estimators.gradient_memory(model, [batch(3, 0)], 3).save(directory / "memory.safetensors")
    dist.barrier()
    found = GradientMemory.load(directory / "memory.safetensors", model)
    return max(
        float((whole(part) - other[name]).abs().max())
        for vector, other in zip(found.vectors, plain.vectors, strict=True)
        for name, part in vector.items()
    )


def main(host: str, directory: Path) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {"memory": memories(host, directory)}
    for name in DRAWS:
        start = build("gpt2" if host == "ddp" else "stablelm")
        by_stream = bool(CASES[name.split()[0]].streams) and DRAWS[name].get("by") != "rows"
        windows = [window(CASES[name.split()[0]], ranks, step, by_stream) for step in range(STEPS)]
        mine = trained(hosted(copy.deepcopy(start), host), start, name, [[w[rank]] for w in windows], alone=False)
        theirs = trained(copy.deepcopy(start), start, name, windows, alone=True)
        results[name] = max(float((mine[n] - theirs[n]).abs().max()) for n in theirs)
    if rank == 0:
        (directory / "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(sys.argv[1], Path(sys.argv[2]))
