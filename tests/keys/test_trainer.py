"""Tiered methods in ``SurgeryTrainer``: checkpoints of C1, runs that go on from them, secrets that stay out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import ArtefactError
from gradsurgery.keys import configuration_of
from tests.keys.tiers import key_of
from tests.surgery.tiny import anatomy, batch, build, gap, weights

pytest.importorskip("accelerate")
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from tests.surgery.test_trainer import InOrder, arguments, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")
KIND = "gpt_neo"


def pairs() -> list[dict[str, Any]]:
    private, public = rows(), rows()[::-1]
    return [{"private": a, "public": b} for a, b in zip(private, public, strict=True)]


def collate(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(next(iter(chosen[0].values())), dict):
        return {stream: collate([row[stream] for row in chosen]) for stream in chosen[0]}
    return {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}


def method_of(name: str) -> gs.Method:
    key, found = key_of(KIND), anatomy(KIND)
    if name == "finetune":
        return gs.methods.private_finetune(key, found, kl_weight=0.5, l2=0.1)
    return gs.methods.tiered(key, found, every=2, step_in=name)  # type: ignore[arg-type]


def trainer_of(name: str, directory: Path, model: Any, **more: Any) -> InOrder:
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **more}
    data = pairs() if name == "finetune" else rows()
    plain = [{k: v for k, v in row.items() if k not in ("forget", "retain")} for row in rows()]
    options: dict[str, Any] = {"train_dataset": data, "eval_dataset": plain, "data_collator": collate}
    return InOrder(model, arguments(directory, **fields), method=method_of(name), **options)


@pytest.mark.parametrize("name", ["C1", "C2", "finetune"])
def test_checkpoints_are_c1_and_resume_exactly(name: str, tmp_path: Path) -> None:
    whole = build(KIND)
    trainer = trainer_of(name, tmp_path, whole)
    trainer.train()
    assert not configuration_of(whole).now
    stored = tmp_path / "checkpoint-2"
    loaded = AutoModelForCausalLM.from_pretrained(stored)
    assert set(loaded.state_dict()) == set(whole.state_dict())
    resumed = build(KIND, seed=5)
    again = trainer_of(name, tmp_path, resumed)
    again.train(resume_from_checkpoint=str(stored))
    assert gap(weights(whole), weights(resumed)) == 0.0
    assert gap(weights(whole), weights(loaded)) > 1e-4


def test_both_ways_to_step_are_one(tmp_path: Path) -> None:
    found = []
    for name in ("C1", "C2"):
        model = build(KIND)
        trainer_of(name, tmp_path / name, model, gradient_accumulation_steps=2, bf16=True).train()
        found.append(weights(model))
    assert gap(*found) < 1e-6


def test_the_other_way_to_step_does_not_take_a_checkpoint(tmp_path: Path) -> None:
    """Moments lie where the run stepped: a checkpoint says so, and another plan is refused."""
    trainer_of("C2", tmp_path, build(KIND)).train()
    with pytest.raises(ArtefactError, match="another method"):
        trainer_of("C1", tmp_path, build(KIND)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_no_swap_is_in_any_file(tmp_path: Path) -> None:
    """Fingerprints are; what they stand for is not, nor anything that lists slots."""
    key = key_of(KIND)
    slots = {f"{a},{b}" for swaps in key.lists.values() for swap in swaps for a, b in swap}
    for name in ("C2", "finetune"):
        trainer_of(name, tmp_path / name, build(KIND)).train()
    named = 0
    for path in tmp_path.rglob("*.json"):
        text = path.read_text()
        named += key.fingerprint in text
        flat = set(re.findall(r"[\[(](\d+,\d+)[\])]", text.replace(" ", "").replace("\n", "")))
        assert not flat & slots, path
    assert named >= 2
    state = json.loads((tmp_path / "C2" / "checkpoint-2" / "surgery.json").read_text())
    assert key.fingerprint in str(state["transforms"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_c2_leaves_c1(error: type[BaseException], tmp_path: Path) -> None:
    model = build(KIND)

    class Burst(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            raise error

    before = weights(model)
    trainer = trainer_of("C2", tmp_path, model)
    trainer.add_callback(Burst())
    with pytest.raises(error):
        trainer.train()
    assert not configuration_of(model).now
    assert gap(weights(model), before) == 0.0
    trainer.pop_callback(Burst)
    trainer.train()
    assert not configuration_of(model).now


def test_a_stock_trainer_goes_on_in_c1(tmp_path: Path) -> None:
    """After training that steps in C2 the optimizer's moments are C1's again."""
    model = build(KIND)
    trainer = trainer_of("C2", tmp_path, model)
    trainer.train()
    optimizer = trainer.optimizer
    plain = Trainer(model, arguments(tmp_path / "plain"), train_dataset=rows(), data_collator=collate)
    plain.optimizer = optimizer
    data = batch(4)
    model(input_ids=data["input_ids"], labels=data["labels"]).loss.backward()
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    optimizer.step()


def test_evaluation_is_of_c1(tmp_path: Path) -> None:
    model = build(KIND)
    trainer = trainer_of("C1", tmp_path, model, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert {"loss/C1", "loss/C2"} <= {k for entry in trainer.state.log_history for k in entry}
