"""What every rank of the sharded ablation test runs; rank 0 writes ``result.json``."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

import gradsurgery as gs
from tests.ranks import joined
from tests.zoo.builder import build


def main(directory: Path) -> None:
    found = {}
    for name in ("llama", "gpt2", "mixtral"):
        model = build(name)
        anatomy = gs.dissect(model)
        chosen = anatomy.kv_groups[:, -1:] | anatomy.neurons[:, [1, 4, 9]]
        for reinit in ("zero", "normal"):
            plain, sharded = copy.deepcopy(model), copy.deepcopy(model)
            fully_shard(sharded)
            gs.ablate_(plain, chosen, reinit, torch.Generator().manual_seed(7))  # type: ignore[arg-type]
            torch.manual_seed(rank())  # generators of ranks may differ: the first one's counts
            gs.ablate_(sharded, chosen, reinit, torch.Generator().manual_seed(7 + rank()))  # type: ignore[arg-type]
            full = {n: p.full_tensor().detach() for n, p in sharded.named_parameters()}  # type: ignore[attr-defined]
            gaps = [float((p - full[n]).abs().max()) for n, p in plain.requires_grad_(False).named_parameters()]
            found[f"{name}/{reinit}"] = max(gaps)
    if rank() == 0:
        (directory / "result.json").write_text(json.dumps(found))


def rank() -> int:
    return int(os.environ["RANK"])


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(Path(sys.argv[-1]))
