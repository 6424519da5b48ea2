"""Run folders resume the same configuration, refuse another, and never hold half a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gradsurgery.errors import ArtefactError
from gradsurgery.runs import RunFolder
from gradsurgery.runs.train import last_whole_checkpoint

CONFIG = {"seed": 0, "train": {"steps": 3}}


def test_the_configuration_is_stored_with_the_version_and_the_same_one_continues(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", CONFIG)
    folder.store("plain", {"loss": 1.5})
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored.pop("gradsurgery") and stored == CONFIG
    assert RunFolder(tmp_path / "run", CONFIG).results() == {"plain": {"loss": 1.5}}


def test_another_configuration_is_refused_by_the_setting_that_differs(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", CONFIG)
    with pytest.raises(ArtefactError, match="seed=0, not 1"):
        RunFolder(tmp_path / "run", {**CONFIG, "seed": 1})
    RunFolder(tmp_path / "run", {**CONFIG, "seed": 1}, overwrite=True)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="no run"):
        RunFolder(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_metric_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", CONFIG)
    for step in range(1, 4):
        folder.log(model="plain", step=step)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"model": "plain", "st')
    assert [m["step"] for m in folder.metrics] == [1, 2, 3]
    folder.rewind(lambda m: m["step"] <= 2)
    assert (folder / "metrics.jsonl").read_text().splitlines() == [
        json.dumps({"model": "plain", "step": step}) for step in (1, 2)
    ]


def test_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", CONFIG)
    with pytest.raises(KeyboardInterrupt), folder.whole_folder("models/plain") as path:
        (path / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert not (folder / "models").exists() and not list(folder.path.glob(".*"))
    with folder.whole_folder("models/plain") as path:
        (path / "model.safetensors").write_text("whole")
    assert (folder / "models/plain/model.safetensors").read_text() == "whole"


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", CONFIG, main=False)
    folder.log(step=1)
    folder.store("plain", {})
    assert not folder.path.exists()


def test_checkpoints_cut_off_by_a_kill_are_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_whole_checkpoint(tmp_path / "none") is None
