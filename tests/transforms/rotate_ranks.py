"""What every rank of the sharded rotation test runs: rotated updates under FSDP2, against one process."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import gradsurgery as gs
from gradsurgery.anatomy.discovery.inputs import dummy_inputs
from gradsurgery.surgery.method import Method
from tests.engines.ranks import full
from tests.ranks import joined
from tests.zoo.builder import build


def train(start: Any, batch: Any, method: Method, sharded: bool) -> dict[str, torch.Tensor]:
    """Weights after two AdamW steps; every rank sees the same rows."""
    model: Any = copy.deepcopy(start)
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with gs.attach(method, model, optimizer) as surgery:
        for _ in range(2):
            surgery.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
    return full(model)


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def columns(basis: Any) -> Any:
    return gs.rotate(basis.top(3), gs.freeze(gs.Coordinates(basis.top(3))))


def entries(basis: Any) -> Any:
    """Entry masks, an empty one and one of whole rows (or columns) among them; the gradient is projected too."""
    torch.manual_seed(0)
    masks = {n: torch.rand(basis.rotated_shape(n)) < 0.4 for n in basis}
    first, *_, last = masks
    masks[first][:] = False
    masks[last] = masks[last][..., :1] if basis.side == "input" else masks[last][..., :1, :]
    return gs.rotate(basis, gs.freeze(gs.Coordinates(basis, masks)), gradient=True)


def summed(model: Any, batch: Any, rank: int) -> float:
    """Second moments of two ranks' rows, added up, against those of all rows."""
    mine = {k: v[2 * rank : 2 * rank + 2] if hasattr(v, "shape") else v for k, v in batch.items()}
    whole: Any = gs.estimators.activation_basis(model, [batch])
    parts: Any = gs.estimators.activation_basis(model, [mine], group=dist.group.WORLD)
    return max(float((whole.spectrum(n) - parts.spectrum(n)).abs().max() / whole.spectrum(n).max()) for n in whole)


def main(directory: Path) -> None:
    rank = dist.get_rank()
    found = {}
    for name, kinds in {
        "llama": ("column", "entry"),
        "gpt2": ("entry", "column"),
        "mixtral": ("entry", "column"),
    }.items():
        start: Any = build(name).double()
        batch = dummy_inputs(start, batch=4, length=7, seed=3)
        stock = train(start, batch, gs.methods.plain(), False)
        found[f"{name}/parts of the data"] = {"gap": summed(start, batch, rank), "stock": 0.0, "moved": 1.0}
        noise = gap(stock, train(start, batch, gs.methods.plain(), True))
        for side, kind in zip(("input", "output"), kinds, strict=True):
            basis: Any = gs.estimators.activation_basis(start, [batch], side=side)  # type: ignore[arg-type]
            method = Method([gs.Pass("p")], update=[columns(basis) if kind == "column" else entries(basis)])
            one = train(start, batch, method, False)
            found[f"{name}/{side}"] = {
                "gap": gap(one, train(start, batch, method, True)),
                "stock": noise,
                "moved": gap(one, stock),
            }
    if rank == 0:
        (directory / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(Path(sys.argv[-1]))
