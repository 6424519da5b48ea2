"""Projections, kept slots and running means inside ``gs.SurgeryTrainer``: as in a plain loop, also after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gradsurgery as gs
from tests.surgery.tiny import batch, build, cut, gap, weights
from tests.transforms.test_project_surgery import BOTH, size

pytest.importorskip("accelerate")
from transformers import TrainerCallback

from tests.surgery.test_trainer import InOrder, arguments, by_hand, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")


def kept() -> gs.Method:
    """A reference that is filled every other step, and its running mean."""
    reference = gs.Pass("reference", size, rows="forget", into="protect", when=gs.every(2), keep=2)
    gradient = [gs.ema("protect", 0.7, into="mean"), gs.project(away_from="mean"), gs.clip(1.0)]
    return gs.Method([gs.Pass("main"), reference], gradient=gradient, update=[gs.leak("mean")])


def both() -> gs.Method:
    gradient = [gs.project(remove="conflict", metrics="global"), gs.clip(1.0)]
    return gs.Method([BOTH], gradient=gradient, update=[gs.project(at="update")])


@pytest.mark.parametrize("method", [kept, both])
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
def test_the_trainer_equals_a_plain_loop_and_logs_what_is_measured(
    method: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    hosted, plain = build(), build()
    trainer = InOrder(hosted, arguments(tmp_path, **more), train_dataset=rows(), method=method())
    trainer.train()
    by_hand(method(), plain)
    assert gap(weights(hosted), weights(plain)) <= 2e-6
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert ("leak/mean" if method is kept else "project/main/protect/cosine_before") in logged


def test_a_resumed_training_run_continues_equally(tmp_path: Path) -> None:
    whole, model = build(), build()
    save = {"save_strategy": "steps", "save_steps": 1}
    InOrder(whole, arguments(tmp_path / "whole"), train_dataset=rows(), method=kept()).train()
    directory = tmp_path / "parts"
    InOrder(model, arguments(directory, max_steps=2, **save), train_dataset=rows(), method=kept()).train()
    resumed = InOrder(build(seed=3), arguments(directory, **save), train_dataset=rows(), method=kept())
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
    assert gap(weights(whole), weights(resumed.model)) == 0.0


def test_a_callback_may_refresh_a_slot(tmp_path: Path) -> None:
    reference = gs.Pass("reference", size, into="protect", when=gs.on_refresh(), keep=2)
    method = gs.Method([gs.Pass("main"), reference], gradient=[gs.project()])
    hosted, plain = build(), build()
    batches = [cut(batch(8, seed=5), 0, 4), cut(batch(8, seed=5), 4, 8)]

    class Refresh(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 2 == 0:
                assert trainer.surgery is not None
                trainer.surgery.refresh("protect", batches)

    trainer = InOrder(
        hosted, arguments(tmp_path, max_grad_norm=0.0), train_dataset=rows(), method=method, callbacks=[Refresh()]
    )
    trainer.train()

    import torch

    decay = [p for n, p in plain.named_parameters() if "norm" not in n]
    rest = [p for n, p in plain.named_parameters() if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    with gs.attach(method, plain, optimizer) as surgery:
        for k in range(3):
            if k % 2 == 0:
                surgery.refresh("protect", batches)
            surgery.backward(cut(batch(12), 4 * k, 4 * k + 4))
            optimizer.step()
            optimizer.zero_grad()
    assert gap(weights(hosted), weights(plain)) <= 2e-6
