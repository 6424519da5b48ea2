"""What every rank of a test of sharded exchanges runs: each case against the slow way on the whole tensors.

Started as ``python -m tests.tensors.ranks <directory>``, once a rank; rank 0 writes ``result.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gradsurgery.errors import PlanError
from gradsurgery.tensors import Exchange, Lines, LineSwap, sharded
from tests.ranks import joined
from tests.tensors.draws import raw, slow_, values

Case = tuple[dict[str, tuple[int, ...]], list[LineSwap]]


def pairs(names: list[str], lines: int, dim: int, seed: int, spans: Any = ()) -> list[LineSwap]:
    """All lines of all tensors in disjoint pairs, some of them within one tensor."""
    generator = np.random.default_rng(seed)
    free = [(name, span, line) for name in names for span in spans or [()] for line in range(lines)]
    drawn = [free[k] for k in generator.permutation(len(free))]
    found: dict[Any, list[tuple[int, int]]] = {}
    for one, other in zip(drawn[::2], drawn[1::2], strict=False):
        found.setdefault((one[:2], other[:2]), []).append((one[2], other[2]))
    out = []
    for ((a, of_a), (b, of_b)), index in found.items():
        both = np.asarray(index)
        out.append(LineSwap(Lines(a, dim, both[:, 0], of_a), Lines(b, dim, both[:, 1], of_b)))
    return out


def cases() -> dict[str, Case]:
    out: dict[str, Case] = {}
    for rows, columns in ((8, 6), (5, 7), (1, 4), (4, 1), (3, 40)):
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys("abc", (rows, columns))
        out[f"rows {rows}x{columns}"] = shapes, pairs(list("abc"), rows, 0, seed=rows)
        out[f"columns {rows}x{columns}"] = shapes, pairs(list("abc"), columns, 1, seed=columns)
    out["vectors"] = dict.fromkeys("ab", (7,)), pairs(["a", "b"], 7, 0, seed=1)
    experts = [((0, e, 1),) for e in range(3)]
    cubes: dict[str, tuple[int, ...]] = dict.fromkeys("ab", (3, 4, 5))
    out["rows of experts"] = cubes, pairs(["a", "b"], 4, 1, 2, experts)
    out["columns of experts"] = cubes, pairs(["a", "b"], 5, 2, 3, experts)
    out["whole experts"] = cubes, pairs(["a", "b"], 3, 0, 4)
    return out


def bits_of(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: raw(tensor).clone() for name, tensor in whole.items()}


def examine(case: Case, placements: dict[str, Any], dtype: torch.dtype, mesh: Any) -> str:
    """What happens to the tensors: ``right``, ``wrong``, or the refusal."""
    shapes, swaps = case
    whole = {name: values(shape, dtype, k) for k, (name, shape) in enumerate(shapes.items())}
    spread = {name: distribute_tensor(t, mesh, [placements[name]]) for name, t in whole.items()}
    wanted = {name: t.clone() for name, t in whole.items()}
    slow_(wanted, swaps)
    swap = Exchange(swaps)

    def full() -> dict[str, torch.Tensor]:
        return bits_of({name: t.full_tensor() for name, t in spread.items()})

    try:
        swap(spread)
    except PlanError as error:
        same = all(torch.equal(t, bits_of(whole)[name]) for name, t in full().items())
        return f"{'refused' if same else 'torn'}: {error}"
    there = all(torch.equal(t, bits_of(wanted)[name]) for name, t in full().items())
    swap(spread)
    back = all(torch.equal(t, bits_of(whole)[name]) for name, t in full().items())
    assert all(isinstance(t, DTensor) for t in spread.values())
    return "right" if there and back else "wrong"


def main(directory: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results: dict[str, str] = {}
    mesh = init_device_mesh("cpu", (ranks,))
    for name, case in cases().items():
        dims = len(next(iter(case[0].values())))
        for dim in [None, *range(dims)]:
            placement = Replicate() if dim is None else Shard(dim)
            for dtype in (torch.float32, torch.bfloat16):
                key = f"{name}, {placement}, {dtype}"
                results[key] = examine(case, dict.fromkeys(case[0], placement), dtype, mesh)
    plain = sharded.exchange_shards
    try:  # a few bytes at a time
        import gradsurgery.tensors.exchange as module

        module.exchange_shards = lambda given, group, chunk: plain(given, group, 24)  # type: ignore[assignment]
        for name in ("rows 5x7", "columns 5x7", "whole experts"):
            results[f"{name}, in parts"] = examine(
                cases()[name], dict.fromkeys(cases()[name][0], Shard(0)), torch.float32, mesh
            )
    finally:
        module.exchange_shards = plain
    mixed: dict[str, Any] = {"a": Shard(0), "b": Shard(1), "c": Shard(0)}
    results["mixed"] = examine(cases()["rows 8x6"], mixed, torch.float32, mesh)
    if rank == 0:
        Path(directory, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(sys.argv[1])
