"""What every rank of the matrix runs: methods on its half of the rows, under DDP and FSDP2.

Started as ``python -m tests.engines.equality_ranks <directory>``, once a rank; ``cells.json`` there says which cells
and which hazards, and rank 0 writes ``result.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gradsurgery.adapters import score
from gradsurgery.errors import GradsurgeryError
from tests.engines.equality import Cell, Weights, trained
from tests.engines.hazard_ranks import hazards
from tests.engines.ranks import host_of
from tests.ranks import joined
from tests.surgery.tiny import gap


def alone(name: str) -> Weights:
    """The plain loop on all rows, as in one process: a score's buffer would gather what other ranks have."""
    before, score.gathered = score.gathered, lambda rows_NR: rows_NR
    try:
        return trained(name)
    finally:
        score.gathered = before


def cell(engine: str, name: str, one: Weights) -> Cell:
    host, _, more = engine.partition(", ")
    try:
        return gap(one, trained(name, lambda model: host_of(model, host), 1 + bool(more), dist.get_rank(), 2))
    except GradsurgeryError as error:  # on all ranks, or the others would wait
        return str(error)


def main(directory: str) -> None:
    given = json.loads(Path(directory, "cells.json").read_text())
    results: dict[str, dict[str, Any]] = {engine: {} for engine in given["engines"]}
    for name in given["names"]:
        one = alone(name)
        for engine in given["engines"]:
            results[engine][name] = cell(engine, name, one)
    if given["hazards"]:
        results["hazards"] = hazards(given["hazards"])
    if dist.get_rank() == 0:
        Path(directory, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(sys.argv[-1])
