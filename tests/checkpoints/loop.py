"""A plain loop that saves and resumes: what every test of checkpoints runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.engines.methods import CASES, batches, optimizer_of, share
from tests.engines.ranks import full, host_of


def stirred(host: nn.Module) -> nn.Module:
    """What is loaded must not have been there before."""
    with torch.no_grad():
        for p in host.parameters():
            if p.requires_grad:
                p.add_(0.1)
    return host


class Run:
    """A method of the registry in a plain loop, on one rank or several.

    Args:
        name: Of the method.
        engine: ``one``, ``ddp`` or ``fsdp2``.
        resumed: Starts from other weights, which a checkpoint must replace.
    """

    def __init__(self, name: str, engine: str = "one", resumed: bool = False, rank: int = 0, ranks: int = 1) -> None:
        self.host, self.method = CASES[name].start()
        self.rank, self.ranks = rank, ranks
        wrapped = self.host if engine == "one" else host_of(self.host, engine)
        self.optimizer = optimizer_of(self.host)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.5, 1.0, total_iters=3)
        self.surgery = gs.attach(self.method, wrapped, self.optimizer)
        if resumed:  # the references that attach took are of the first run's start, and so is what they hold
            stirred(self.host)

    def steps(self, first: int, last: int) -> None:
        for whole in batches(self.method)[first:last]:
            mine = share(whole, self.rank, self.ranks)
            items = self.surgery.count_items([mine], average=self.ranks > 1)
            self.surgery.backward(mine, num_items=items)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def save(self, folder: Path, **more: Any) -> Path:
        return gs.save_checkpoint(folder, self.surgery, scheduler=self.scheduler, **more)

    def load(self, folder: Path) -> Any:
        return gs.load_checkpoint(folder, self.surgery, scheduler=self.scheduler)

    def end(self) -> dict[str, Tensor]:
        self.surgery.remove()
        return full(self.host)


def whole(name: str, engine: str = "one", rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """Weights after three steps without interruption."""
    run = Run(name, engine, rank=rank, ranks=ranks)
    run.steps(0, 3)
    return run.end()
