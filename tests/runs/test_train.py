"""Training runs: what the model is fed, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.data import MixedSampler, Rows
from gradsurgery.runs import OrderedRows, RunFolder, TrainConfig, train
from tests.surgery.tiny import VOCABULARY, build

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_come_in_the_order_of_the_sampler(tmp_path: Path, accumulation: int) -> None:
    ids = torch.randint(3, VOCABULARY, (10, 7), generator=torch.Generator().manual_seed(0))
    rows = Rows.uniform(ids, "plain", forget=False, retain=False, categories=("plain",))
    sampler = MixedSampler(rows, 4, seed=1)
    model: Any = build()
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].cpu()), with_kwargs=True)
    config = TrainConfig(steps=3, accumulation=accumulation, eval_every=0, save_every=0, log_every=1)
    steps = OrderedRows(rows, sampler, config.steps)
    train("plain", model, gs.methods.plain(), steps, RunFolder(tmp_path / "run", {}), config, seed=0)
    wanted = [index for step in range(3) for index in sampler.indices(step)]
    assert len(seen) == 3 * accumulation
    assert torch.equal(torch.cat(seen), ids[wanted])
