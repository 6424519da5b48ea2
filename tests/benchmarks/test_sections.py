"""The sections with sizes of their own run, made tiny: each row for two pairs, and their files appear."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import keys, projection, quarantine, rotation, steps

SMALL = {"LAYERS": 2, "WIDTH": 32, "HEADS": 8, "VOCABULARY": 80, "TOKENS": 64}
ROTATED: dict[str, Any] = {"WIDTH": 36, "NEURONS": 48, "TOKENS": 32, "SIZES": (64,)}
FIRST = {
    "steps": "freeze 95%",
    "keys": "tiered",
    "rotation": "reparametrised",
    "projection": "opposed",
    "quarantine": "route by score, token",
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (steps, keys, quarantine):
        for name, value in SMALL.items():
            monkeypatch.setattr(module, name, value, raising=False)
    for name, value in ROTATED.items():
        monkeypatch.setattr(rotation, name, value)
    small = {f"{name}, 64 tokens": c for name, c in rotation._candidates(64).items()}
    monkeypatch.setattr(rotation, "METHODS", small)
    monkeypatch.setattr(steps, "FORGET_NEURONS", 8)
    monkeypatch.setattr(command, "peak", lambda *arguments: 1)  # processes of their own, full size
    yield
    gc.collect()  # temporary folders of caches go while their warning is expected


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("section", FIRST)
def test_every_row_of_a_section_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--sections", section, "--device", "cpu", "--pairs", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    command.main()
    assert FIRST[section] in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "benchmarks.json").read_text())[section]


def test_projection_names_the_peers_that_it_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection.importlib.util, "find_spec", lambda name: None)
    missing = projection.METHODS.keys() - projection.available().keys()
    assert missing == {"TorchJD PCGrad", "TorchJD UPGrad"}
