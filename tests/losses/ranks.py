"""Two ranks under ``fully_shard``: snapshots are those of one process; rank 0 writes ``result.json``."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import gradsurgery as gs
from tests.losses.models import build, inputs, logits, same
from tests.losses.test_snapshot import only, regions
from tests.ranks import joined


def sharded(model: nn.Module, reshard: bool) -> nn.Module:
    model = copy.deepcopy(model)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1)
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    return model


def agrees(kind: str, name: str, reshard: bool) -> dict[str, bool]:
    plain = build(kind).eval()
    region, before = regions(plain)[name], logits(plain)
    model, alone = sharded(plain, reshard), gs.losses.snapshot(region)
    alone.take(plain)
    reference = gs.losses.snapshot(region)
    reference.take(model)
    only(region, plain)
    moved = dict(plain.named_parameters())
    with torch.no_grad():
        for p_name, p in model.named_parameters():
            p.copy_(distribute_tensor(moved[p_name].detach(), p.device_mesh, p.placements))  # type: ignore[attr-defined]
    live = model(**inputs()).logits.detach()  # leaves gathered weights behind, without resharding
    seen = reference(model, inputs())
    again = model(**inputs()).logits
    again.sum().backward()
    state = reference.state_dict()
    resumed = gs.losses.snapshot(region)
    resumed.take(model)
    resumed.load_state_dict(state)
    return {
        "reference": torch.allclose(seen, before, rtol=1e-5, atol=1e-6),
        "restored": torch.equal(again.detach(), live),
        "state": same(state, alone.state_dict()),
        "resumed": torch.equal(resumed(model, inputs()), seen),
    }


def main(directory: Path) -> None:
    found = {}
    for kind, name, reshard in [("llama", "units", True), ("llama", "everything", False), ("gpt2", "units", False)]:
        for what, holds in agrees(kind, name, reshard).items():
            found[f"{kind}/{name}/{reshard}/{what}"] = holds
    if dist.get_rank() == 0:
        (directory / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(Path(sys.argv[1]))
