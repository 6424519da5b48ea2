"""Kills a real training at random moments, over and over, and lets it resume; what is left must be a run without kills.

Started as ``python -m tests.checkpoints.killed <ranks> <kills> <seed> <directory>``; writes ``result.json``. Every
attempt is a fork of this process, in which nothing has run yet, so that a hundred of them take minutes. Rows of every
step are drawn from the global generator, and the numbers drawn are in the checkpoint: a draw lost or doubled shows, as
does a step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gradsurgery as gs
from tests.checkpoints.loop import Run
from tests.engines.methods import share
from tests.surgery.tiny import batch

METHOD = "gru"  # a moving average of gradients: state of its own


def train(folder: Path, engine: str, rank: int, ranks: int, until: int | None) -> dict[str, torch.Tensor]:
    """Resume where a checkpoint is, and save after every step; without ``until`` for ever."""
    torch.manual_seed(7)
    run = Run(METHOD, engine, rank=rank, ranks=ranks)
    torch.manual_seed(8)
    drawn: list[int] = run.load(folder)["drawn"] if gs.latest_checkpoint(folder) else []
    while until is None or run.surgery.step < until:
        drawn.append(int(torch.randint(1000, (1,))))
        mine = share(batch(8, seed=drawn[-1]), rank, ranks)
        run.surgery.backward(mine, num_items=run.surgery.count_items([mine], average=ranks > 1))
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
        run.save(folder, extra={"drawn": drawn}, keep=2)
    return run.end()


def forked(call: Callable[[], None]) -> int:
    """A child that runs ``call``; never returns there."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        call()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)


def attempt(folder: Path, ranks: int, store: Path, until: int | None, out: Path | None = None) -> list[int]:
    """Start every rank of a run."""

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        if ranks > 1:
            dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
        weights = train(folder, "fsdp2" if ranks > 1 else "one", rank, ranks, until)
        if out is not None and rank == 0:
            torch.save(weights, out)

    return [forked(lambda rank=rank: one(rank)) for rank in range(ranks)]  # type: ignore[misc]


def finished(children: list[int]) -> None:
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)


def main(ranks: int, kills: int, seed: int, directory: Path) -> None:
    draw, folder = random.Random(seed), directory / "killed"
    steps, cut_off, survived = [0], 0, 0
    for k in range(kills):
        before = gs.latest_checkpoint(folder)
        children = attempt(folder, ranks, directory / f"store{k}", None)
        patience = time.monotonic() + 60 if draw.random() < 0.6 else 0.0  # the others may die before their first step
        while gs.latest_checkpoint(folder) == before and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.5))
        for child in draw.sample(children, len(children)):
            os.kill(child, signal.SIGKILL)
            time.sleep(draw.uniform(0.0, 0.02))
        for child in children:
            os.waitpid(child, 0)
        cut_off += any(folder.glob(".step-*.part"))
        last = gs.latest_checkpoint(folder)
        found = int(last.name.removeprefix("step-")) if last else 0
        assert found >= steps[-1], f"kill {k} lost steps {found + 1} to {steps[-1]}"
        survived += found > steps[-1]
        steps.append(found)
    until = steps[-1] + 2
    finished(attempt(folder, ranks, directory / "store", until, directory / "killed.pt"))
    finished(attempt(directory / "whole", ranks, directory / "store whole", until, directory / "whole.pt"))
    theirs, mine = (torch.load(directory / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    extras: list[Any] = []
    for name in ("whole", "killed"):
        last = gs.latest_checkpoint(directory / name)
        assert last is not None
        extras.append(json.loads((last / "checkpoint.json").read_text())["extra"]["drawn"])
    result = {
        "equal": all(torch.equal(theirs[name], mine[name]) for name in theirs),
        "steps": until,
        "drawn": extras,
        "killed while saving": cut_off,
        "went on": survived,
        "left behind": sorted(path.name for path in folder.iterdir()),
    }
    (directory / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
