"""Every row of the columns runs, tiny and for one pair; files appear; compiled graphs are counted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import gradsurgery as gs
from benchmarks import __main__ as command
from benchmarks import columns
from benchmarks.columns import ROWS, Bench, Row
from benchmarks.models import Setting, fill

compiles = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=["fp32", "autocast", "bf16"])
def bench(request: Any) -> Bench:
    """On a CPU also in what accelerators are measured in."""
    return Bench(Setting("tiny", "cpu", request.param, False, 4, 16))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_steps_and_leaves_the_stock_model_alone(name: str, bench: Bench) -> None:
    row = ROWS[name]
    with bench.candidate(row) as step:
        for labels in columns.labels_seen(row):
            before = [p.detach().clone() for p in bench.model.parameters()]
            step(labels)
            moved = any(not torch.equal(p, old) for p, old in zip(bench.model.parameters(), before, strict=True))
            assert moved, (name, labels)  # the twin's step is a step of the same weights
            assert all(p.grad is None for p in bench.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bench.model.modules())


def test_json_and_markdown_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = "itself|mixed batch|freeze 5|clip"
    options = ["--sections", "columns", "--models", "tiny", "--device", "cpu", "--pairs", "1", "--only", only]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options, "--out", str(tmp_path)])
    command.main()
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    (column,) = json.loads((tmp_path / "benchmarks.json").read_text())["columns"].values()
    measured = {name for name in ROWS if name in column}
    assert len(measured) == 6
    for name in measured:
        assert f"| {name} " in text
        assert len(column[name]["ratios"]) == 1
        assert column[name]["peak bytes"] > 0
    assert "Not measured" not in text


def refused(anatomy: gs.Anatomy, model: Any) -> gs.Method:
    return gs.methods.sgtm(anatomy, anatomy.heads[:, -1:], "nothing")  # type: ignore[arg-type]


def too_large(anatomy: gs.Anatomy, model: Any) -> gs.Method:
    raise torch.OutOfMemoryError("tried to allocate more than there is")


def test_what_is_not_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"refused": Row(refused), "large": Row(too_large), "mixed": Row(columns.sgtm, "mixed")}
    monkeypatch.setattr(columns, "ROWS", rows)
    text, raw = columns.column(Setting.of("tiny", "cpu", batch=1), 1)
    assert "Not measured: refused: refused (PlanError): sgtm: strategy is one of" in text
    assert "Not measured: large: does not fit in memory." in text
    assert "Not measured: mixed: a mixed batch takes two rows" in text
    assert all("why not" in raw[name] for name in rows)


def test_a_batch_that_is_not_given_is_filled_or_said_not_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    open_batch = replace(Setting.of("tiny", "cpu"), batch=0)
    monkeypatch.setattr(columns, "fill", lambda setting: fill(setting, start=8))
    text, raw = columns.measure([open_batch], 1, "itself")
    assert "8 x 16 tokens" in text
    ((name, found),) = raw.items()
    assert "8 x 16 tokens" in name
    assert found["setting"]["batch"] == 8
    monkeypatch.setattr(columns, "fill", lambda setting: too_large(None, None))  # type: ignore[arg-type]
    text, raw = columns.measure([open_batch], 1)
    assert text.endswith("2 x 16 tokens: does not fit in memory.")


def test_labels() -> None:
    assert columns.labels_of("mixed", 3) == {"forget": [True, False, True], "retain": [False, True, False]}
    assert columns.labels_of("none", 2) == {"forget": [False] * 2, "retain": [False] * 2}
    with pytest.raises(ValueError, match="labels are"):
        columns.labels_of("keep", 2)


@compiles
def test_breaks_and_recompilations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters that the columns read still count."""
    torch.compiler.reset()
    counters.clear()

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    run = torch.compile(broken, backend="eager", dynamic=False)
    run(torch.zeros(2))
    assert sum(counters["graph_break"].values()) == 1
    graphs = counters["stats"]["unique_graphs"]
    run(torch.zeros(3))
    assert counters["stats"]["unique_graphs"] > graphs
    torch.compiler.reset()


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_compiled_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "host", lambda setting, model: torch.compile(model, backend="aot_eager"))
    torch.compiler.reset()
    found = columns.row_of(Bench(Setting.of("tiny", "cpu", compile=True)), ROWS[name], 1)
    torch.compiler.reset()
    assert found["graph breaks added"] == 0
    assert found["recompilations"] == 0
    assert len(found["ratios"]) == 1
