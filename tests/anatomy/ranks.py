"""What every rank dissects: models in DDP and under ``fully_shard``; rank 0 writes ``result.json``."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradsurgery as gs
from gradsurgery.anatomy.store import describe
from tests.anatomy.test_wrappers import IDS, Custom
from tests.ranks import joined
from tests.zoo.builder import build

LARGE = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1024, "num_hidden_layers": 3}


def sharded(model: nn.Module) -> nn.Module:
    """Every layer by itself, and what is left."""
    model = copy.deepcopy(model)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def same_everywhere(anatomy: gs.Anatomy) -> bool:
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, json.dumps(describe(anatomy)))
    return len(set(texts)) == 1


def main(directory: Path) -> None:
    found = {}
    config = transformers.CONFIG_MAPPING["llama"](**LARGE, num_key_value_heads=4, vocab_size=900)
    cases: dict[str, tuple[nn.Module, Any]] = {name: (build(name), None) for name in ("llama", "gpt2", "mixtral")}
    cases["custom"] = (Custom(), IDS)
    cases["large"] = (transformers.AutoModelForCausalLM.from_config(config), None)
    for name, (model, inputs) in cases.items():
        anatomy = gs.dissect(model, inputs)
        whole = gs.dissect(nn.parallel.DistributedDataParallel(model), inputs)
        found[f"{name}/ddp"] = whole == anatomy and same_everywhere(whole)
        shards = sharded(model)
        parts = gs.dissect(shards, inputs)
        fits = parts.space.fingerprint == anatomy.space.fingerprint == gs.region(shards, "*").space.fingerprint
        found[f"{name}/fsdp2"] = parts == anatomy and same_everywhere(parts) and fits
    model = build("llama")
    anatomy = gs.dissect(model)
    chosen = anatomy.neurons[:, [0, 3]]
    shards = sharded(model)
    gs.ablate_(model, chosen)
    gs.ablate_(shards, gs.dissect(shards).neurons[:, [0, 3]])
    full = {name: p.full_tensor() for name, p in shards.named_parameters()}  # type: ignore[attr-defined]
    found["units found in shards"] = all(torch.equal(p, full[name]) for name, p in model.named_parameters())
    anatomy.save(directory / f"anatomy{dist.get_rank()}.json")
    found["made before, loaded after"] = (
        gs.Anatomy.load(directory / f"anatomy{dist.get_rank()}.json", shards) == anatomy
    )
    if dist.get_rank() == 0:
        (directory / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(Path(sys.argv[-1]))
