"""Small pieces of runs: categories by name, bits that changed, adapters of a budget, utilisation, other checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gradsurgery as gs
from gradsurgery.data import Document
from gradsurgery.data.split import Split
from gradsurgery.errors import ArtefactError, DataError, KeyStateError, PlanError
from gradsurgery.runs import RunFolder, lora
from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.metrics import Metrics, peak_flops
from gradsurgery.runs.setup import build_tokenizer, choose, held_back
from gradsurgery.runs.tiers import changed_entries
from gradsurgery.runs.train import adopt
from tests.surgery.tiny import build

CORPUS = {
    "en": Split([Document("bible/1", "In the beginning"), Document("news/1", "Hello")], [Document("bible/2", "And")]),
    "es": Split([Document("bible/1", "En el principio")], []),
}


def test_categories_and_parts_of_them_are_chosen_by_name() -> None:
    chosen = choose(CORPUS, ["en:news", "es"])
    assert [d.text for d in chosen["en:news"].train] == ["Hello"] and chosen["en:news"].validation == []
    assert chosen["es"] == CORPUS["es"]
    with pytest.raises(DataError, match="'fr'"):
        choose(CORPUS, ["fr"])
    with pytest.raises(DataError, match="'novel'"):
        choose(CORPUS, ["en:novel"])


def test_tokenizers_are_trained_on_what_they_are_given() -> None:
    assert len(build_tokenizer("train:300", CORPUS)) <= 300
    with pytest.raises(DataError, match="train:4096"):
        build_tokenizer("train:many", CORPUS)


def test_held_back_rows_are_spread_over_the_documents() -> None:
    tokenizer = build_tokenizer("embedded", CORPUS)
    corpus = {"en": Split([], [Document(str(k), "a b c d e f g h " * 4) for k in range(40)])}
    ids = held_back(corpus, tokenizer, context=8, rows=5)["en"]
    assert ids.shape == (5, 8)
    with pytest.raises(DataError, match="do not fill"):
        held_back(corpus, tokenizer, context=10_000, rows=5)


def test_every_bit_counts_as_changed() -> None:
    model = build()
    anatomy = gs.dissect(model)
    region = anatomy.neurons[:, :4]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert changed_entries(before, model, region) == changed_entries(before, model, ~region) == 0
    name = next(iter(region.entries))
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        parameter.zero_()
        before[name].zero_()
        parameter.view(-1)[:] = -0.0  # equal to 0.0, and another bit
    inside = changed_entries(before, model, region)
    assert inside > 0 and inside + changed_entries(before, model, ~region) == parameter.numel()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
def test_adapters_fill_a_budget_and_leave_a_stock_model() -> None:
    pytest.importorskip("peft")
    model = build()
    names = [name for name, _ in model.named_parameters()]
    smallest = (
        lora.trained(lora.add_adapter(build(), 10**6)) // lora.add_adapter(build(), 10**6).peft_config["default"].r
    )
    adapted = lora.add_adapter(model, 3 * smallest + 1)
    assert lora.trained(adapted) == 3 * smallest
    merged = lora.merged(adapted)
    assert [name for name, _ in merged.named_parameters()] == names
    with pytest.raises(PlanError, match="rank 1"):
        lora.add_adapter(build(), smallest - 1)


def test_utilisation_is_flops_a_second_over_the_peak(tmp_path: Path) -> None:
    assert peak_flops(2.0, bf16=False) == 2e12
    metrics = Metrics(RunFolder(tmp_path / "run", {}), "m", flops=6e6, tokens=1000.0, score=None, peak=1e15)
    metrics.meter.add(5000)
    speed = metrics.speed()
    assert speed["mfu"] == pytest.approx(speed["tokens_per_second"] * 6e3 / 1e15, abs=1e-6)
    assert "mfu" not in Metrics(RunFolder(tmp_path / "run", {}), "m", 6e9, 1000.0, None, None).speed()


def test_the_schedule_ends_where_it_is_told() -> None:
    assert TrainConfig().schedule() == {"lr_scheduler_type": "cosine"}
    schedule = TrainConfig(min_learning_rate=1e-5).schedule()
    assert schedule["lr_scheduler_kwargs"] == {"min_lr": 1e-5}


def checkpoint(folder: Path, moments: str | None = None, optimizer: bool = True) -> Path:
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    state = {"transforms": {"0": {"moments": moments}}} if moments else {}
    (folder / "surgery.json").write_text(json.dumps(state))
    if optimizer:
        (folder / "optimizer.pt").write_bytes(b"")
    return folder


def test_another_scripts_checkpoint_comes_without_its_method(tmp_path: Path) -> None:
    out = adopt(checkpoint(tmp_path / "other", moments="C1"), tmp_path / "mine")
    assert out == tmp_path / "mine/checkpoint-3"
    assert {path.name for path in out.iterdir()} == {"trainer_state.json", "optimizer.pt"}
    with pytest.raises(KeyStateError, match="stepped in C2"):
        adopt(checkpoint(tmp_path / "keyed", moments="3f9a"), tmp_path / "mine")
    with pytest.raises(ArtefactError, match="optimizer"):
        adopt(checkpoint(tmp_path / "stock", optimizer=False), tmp_path / "mine")
    with pytest.raises(ArtefactError, match="checkpoint of a training"):
        adopt(tmp_path / "nowhere", tmp_path / "mine")
