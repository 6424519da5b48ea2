"""``gs.SurgeryCallback``: a stock Trainer's own forward, loss and backward under the transforms of one pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.surgery import SurgeryCallback
from tests.surgery.test_attach import traces
from tests.surgery.tiny import batch, build, checkpointing, forget_of, gap, sgtm, weights

pytest.importorskip("accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.surgery.test_trainer import InOrder, arguments, ours, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")


class Stock(Trainer):
    _get_train_sampler = InOrder._get_train_sampler


def plain_arguments(directory: Path, **more: Any) -> TrainingArguments:
    return arguments(directory, **{"remove_unused_columns": False, "max_grad_norm": 0.0, **more})


@pytest.mark.parametrize(
    "more",
    [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {checkpointing(): True}],
    ids=["plain", "accumulation", "checkpointing"],
)
def test_equals_the_surgery_trainer(tmp_path: Path, more: dict[str, Any]) -> None:
    ours_model, stock_model = build(), build()
    InOrder(ours_model, arguments(tmp_path, **more), train_dataset=rows(), method=sgtm()).train()
    callback = SurgeryCallback(sgtm())
    before = traces(stock_model)
    trainer = Stock(stock_model, plain_arguments(tmp_path, **more), train_dataset=rows(), callbacks=[callback])
    trainer.train()
    assert gap(weights(ours_model), weights(stock_model)) < 2e-6
    assert callback.surgery is None
    if checkpointing() not in more:  # for which the Trainer itself leaves a hook on the embedding
        assert ours(traces(stock_model)) == ours(before)
    assert all("grad_norm" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_evaluation_inside_training_runs_plain(tmp_path: Path) -> None:
    model = build()
    more = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 12}
    trainer = Stock(
        model,
        plain_arguments(tmp_path, **more),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[SurgeryCallback(sgtm())],
    )
    trainer.train()
    (found,) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    whole = batch(12)
    with torch.no_grad():
        plain = model.eval()(**{k: whole[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    assert found == pytest.approx(float(plain), rel=1e-5)


def test_state_is_saved_and_resumed(tmp_path: Path) -> None:
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build()
    Stock(whole, plain_arguments(tmp_path, **more), train_dataset=rows(), callbacks=[SurgeryCallback(sgtm())]).train()
    stored = tmp_path / "checkpoint-2"
    assert json.loads((stored / "surgery.json").read_text())["step"] == 2
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            assert callback.surgery is not None
            steps.append(callback.surgery.step)

    callback, resumed = SurgeryCallback(sgtm()), build(seed=3)
    args = plain_arguments(tmp_path, **more)
    Stock(resumed, args, train_dataset=rows(), callbacks=[callback, Watch()]).train(resume_from_checkpoint=str(stored))
    assert steps == [2]
    assert gap(weights(whole), weights(resumed)) == 0.0


def test_after_an_exception_remove_takes_everything_off(tmp_path: Path) -> None:
    model, callback = build(), SurgeryCallback(sgtm())
    data = [{k: v for k, v in row.items() if k != "retain"} for row in rows()]
    before = traces(model)
    trainer = Stock(model, plain_arguments(tmp_path), train_dataset=data, callbacks=[callback])
    with pytest.raises(BatchError, match="'retain'"):
        trainer.train()
    callback.remove()
    callback.remove()
    assert ours(traces(model)) == ours(before)
    Stock(model, plain_arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()


def mask() -> Any:
    return gs.mask(forget_of(), where="forget")


@pytest.mark.parametrize(
    ("passes", "match"),
    [
        ([gs.Pass("a"), gs.Pass("b")], "this method has 2 passes"),
        ([gs.Pass("a", stream="x")], "a stream"),
        ([gs.Pass("a", rows="x")], "rows"),
        ([gs.Pass("a", weight=0.5)], "a weight"),
        ([gs.Pass("a", into="other")], "a slot"),
        ([gs.Pass("a", when=gs.every(2))], "a schedule"),
        ([gs.Pass("a", refs={"x": cast(Any, len)})], "refs"),
        ([gs.Pass("a", loss=lambda *_: torch.zeros(()))], "a loss of its own"),
        ([gs.Pass("a", loss={"x": gs.losses.causal_lm, "y": gs.losses.causal_lm})], "a loss of its own"),
    ],
)
def test_what_a_stock_trainer_would_ignore_is_refused(passes: list[gs.Pass], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        SurgeryCallback(gs.Method(passes))
    with pytest.raises(PlanError, match=r"takes a gs\.Method"):
        SurgeryCallback("sgtm")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns=False"),
        ({"max_grad_norm": 1.0}, r"gs\.clip\(1\.0\)"),
        ({"torch_compile": True}, "compiled forward"),
    ],
)
def test_arguments_that_would_be_silently_wrong_are_refused(tmp_path: Path, more: dict[str, Any], match: str) -> None:
    model = build()
    before = traces(model)
    args = plain_arguments(tmp_path, **more)
    with pytest.raises(PlanError, match=match):
        Stock(model, args, train_dataset=rows(), callbacks=[SurgeryCallback(sgtm())]).train()
    assert ours(traces(model)) == ours(before)
