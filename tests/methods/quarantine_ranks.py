"""What every rank runs: routed gradients of its rows under DDP, FSDP2, or no wrapper, against one process.

One rank has no flagged row in the first batch, the other has nothing but flagged rows in the second.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradsurgery as gs
from gradsurgery.adapters import Quantile, Score
from tests.adapters.tiny import adapted, batch, clear, gap, grads, rows_of, size
from tests.ranks import joined

FLAGS = [[0, 0, 0, 1, 0, 1], [1, 1, 1, 0, 1, 0]]


def gradients(name: str, mode: Any, by_score: bool, step: int, host: str) -> dict[str, torch.Tensor]:
    adapter = adapted(name, rank=4)
    score = None
    if by_score:
        pairs = [(batch(3, seed=1), batch(3, seed=2))]
        score = Score(gs.estimators.paired_direction(adapter.model, adapter, pairs, noise="keep"), Quantile(0.4))
    wrapped, alone = host_of(adapter.host, host), host == "one"
    method = gs.methods.quarantine(adapter, mode, None if by_score else "flag", score)
    given: dict[str, Any] = {**batch(6, seed=step), "flag": torch.tensor(FLAGS[step], dtype=torch.bool)}
    if not alone:
        given = rows_of(given, slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3))
    clear(adapter)
    with gs.attach(method, wrapped) as surgery:
        surgery.backward(given, num_items=surgery.count_items([given], average=not alone))
    if host == "model":  # nobody reduces the gradients of what lies beside the model
        adapter.average_gradients_()
    found = {**grads(adapter, "kept"), **grads(adapter, "quarantine")}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def host_of(model: Any, host: str) -> Any:
    if host == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if host == "fsdp2":
        for block in next(m for m in model.model.modules() if isinstance(m, nn.ModuleList)):
            fully_shard(block)
        fully_shard(model)
    return model


def main(name: str, host: str, directory: str) -> None:
    rank = dist.get_rank()
    results: dict[str, Any] = {}
    for mode in ("route", "absorb"):
        for by_score in (False, True):
            for step in range(2):
                many = gradients(name, mode, by_score, step, host)
                dist.barrier()
                one = alone(lambda: gradients(name, mode, by_score, step, "one"))  # noqa: B023
                results[f"{mode}/{by_score}/{step}"] = {"gap": gap(many, one), "size": size(one)}
    if rank == 0:
        Path(directory, "result.json").write_text(json.dumps(results))


def alone(call: Any) -> Any:
    """As in one process: the score's buffer would gather other ranks' rows."""
    from gradsurgery.adapters import score

    before, score.gathered = score.gathered, lambda rows_NR: rows_NR
    try:
        return call()
    finally:
        score.gathered = before


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(sys.argv[1], sys.argv[2], sys.argv[3])
