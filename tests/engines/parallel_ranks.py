"""What every rank of the test of tensor parallelism runs: methods and tools on a model that lies cut on two ranks.

Started as ``python -m tests.engines.parallel_ranks <all or quick> <directory>``, once a rank; rank 0 writes
``result.json``. All ranks have the same rows, and one process has the whole model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gradsurgery.errors import GradsurgeryError
from tests.engines.equality import Weights
from tests.engines.parallel_cases import METHODS, QUICKLY, add_families, cut, gathered, stepped, torch_plan
from tests.engines.parallel_refusals import REFUSALS
from tests.engines.parallel_tools import QUICK_TOOLS, TOOLS, entries_that_differ
from tests.keys.tiers import double
from tests.ranks import joined
from tests.surgery.tiny import gap

BY_TORCH = ("sgtm, zero", "tiered")


def method(directory: str, name: str) -> list[float] | str:
    """The largest difference from one process, and how far its weights moved; or why the method is refused."""
    kind, make = METHODS[name]
    try:
        many = stepped(cut(directory, kind), make)
    except GradsurgeryError as error:  # on all ranks, or the others would wait
        return str(error)
    start = double(kind)
    before = gathered(dict(start.named_parameters()))
    one = stepped(start, make)
    return [gap(one, many), gap(one, before)]


def tool(directory: str, name: str) -> float:
    kind, run = TOOLS[name]
    found: list[Weights] = [run(model) for model in (cut(directory, kind), double(kind))]
    assert found[0].keys() == found[1].keys() and found[0]
    return gap(*found)


def by_torch(name: str) -> float:
    kind, make = METHODS[name]
    return gap(stepped(torch_plan(double(kind)), make), stepped(double(kind), make))


def refusal(directory: str, name: str) -> str:
    try:
        REFUSALS[name](directory)
    except GradsurgeryError as error:
        return str(error)
    return "not refused"


def main(which: str, directory: str) -> None:
    add_families()
    methods, tools = (METHODS, TOOLS) if which == "all" else (QUICKLY, QUICK_TOOLS)
    results: dict[str, Any] = {
        "methods": {name: method(directory, name) for name in methods},
        "tools": {name: tool(directory, name) for name in tools},
        "torch": {name: by_torch(name) for name in BY_TORCH},
        "entries": entries_that_differ(),
        "refusals": {name: refusal(directory, name) for name in REFUSALS},
    }
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, results["refusals"])
    results["refusals of the others"] = said[1:]
    if dist.get_rank() == 0:
        Path(directory, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(sys.argv[1], sys.argv[2])
