"""What every rank runs: resume what another world size saved, save for it, and resume what it saved itself.

Started as ``python -m tests.checkpoints.ranks <methods> <directory>``, once a rank; rank 0 writes ``result.json``: the
weights' largest difference from one uninterrupted process, by method, engine and who saved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

import gradsurgery as gs
from gradsurgery.errors import GradsurgeryError
from tests.checkpoints.loop import Run, whole
from tests.ranks import joined
from tests.surgery.tiny import gap

ENGINES = ("ddp", "fsdp2")


def resumed(name: str, engine: str, folder: Path) -> Any:
    run = Run(name, engine, resumed=True, rank=dist.get_rank(), ranks=dist.get_world_size())
    assert run.load(folder) == {"steps": 2}
    run.steps(2, 3)
    return run.end()


def failing(name: str, directory: Path) -> str:
    """One rank cannot write: all must say so, and none wait."""
    run = Run(name, "fsdp2", rank=dist.get_rank(), ranks=dist.get_world_size())
    run.steps(0, 1)
    scheduler = run.scheduler
    if dist.get_rank() == 1:
        scheduler.state_dict = lambda: {"what": object()}  # type: ignore[method-assign,assignment,return-value]
    try:
        gs.save_checkpoint(directory / "failing", run.surgery, scheduler=scheduler)
    except GradsurgeryError as error:
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, str(error))
        return " | ".join(said)
    finally:
        run.end()
    return "saved"


def main(names: str, directory: str) -> None:
    folder, results = Path(directory), dict[str, Any]()
    for name in names.split(";"):
        expected = whole(name)
        for engine in ENGINES:
            run = Run(name, engine, rank=dist.get_rank(), ranks=dist.get_world_size())
            run.steps(0, 2)
            run.save(folder / name / engine, extra={"steps": 2})
            run.end()
        for engine in ENGINES:
            for saved in ("one", *ENGINES):
                results[f"{name}/{engine} of {saved}"] = gap(resumed(name, engine, folder / name / saved), expected)
        dist.barrier()
    results["failing"] = failing("sgtm, mask", folder)
    results["left behind"] = sorted(p.name for p in (folder / "failing").glob("*"))
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(*sys.argv[1:])
