"""What every rank runs: RMU's gradients of its rows under DDP or FSDP2, against one process; rank 0 writes."""

from __future__ import annotations

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
from tests.surgery.tiny import batch, build

TRAINED = "model.layers.0.mlp.down_proj.weight"


def gradient(host: str, steps: int) -> tuple[Tensor, Tensor]:
    """Of the last of some steps, and the weight after it."""
    model = build("llama").double()
    wrapped: Any = model
    if host == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif host == "fsdp2":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    method = gs.methods.rmu("model.layers.0", gs.region(model, TRAINED), retain_weight=3.0, steering=4.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    data: dict[str, Any] = batch(rows=6)
    if host != "one":
        data = {name: column[dist.get_rank() :: 2] for name, column in data.items()}
    with gs.attach(method, wrapped, optimizer) as surgery:
        for _ in range(steps):
            optimizer.zero_grad()
            surgery.backward(data, num_items=surgery.count_items([data], average=host != "one"))
            optimizer.step()
        parameter = model.get_parameter(TRAINED)
        assert parameter.grad is not None
        found = parameter.grad, parameter.detach()
    return tuple(t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for t in found)  # type: ignore[return-value]


def main(host: str, directory: str) -> None:
    one = gradient("one", 3)
    with joined(directory):
        many = gradient(host, 3)
        rank = dist.get_rank()
    if rank == 0:
        gaps = [float((a - b).abs().max()) for a, b in zip(one, many, strict=True)]
        Path(directory, "result.json").write_text(json.dumps({"gaps": gaps, "size": float(one[0].abs().max())}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
