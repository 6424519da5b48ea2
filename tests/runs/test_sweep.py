"""Sweeps over a recipe that costs nothing: cells, skipping, kills, versions, sums over seeds; and one real smoke."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsurgery.errors import ArtefactError, DataError
from gradsurgery.evaluation import ScalingCurve
from gradsurgery.runs import sweep as module
from gradsurgery.runs.sweep import finished, read_sweep, run_sweep
from gradsurgery.runs.sweep_report import draw, write_sweep_report
from gradsurgery.runs.sweep_results import collect, gap_rows, leakages, loss_rows, penalties
from gradsurgery.version import __version__

ROOT = Path(__file__).parents[2]
FAKE = """
import json, os, sys, time
from dataclasses import dataclass, field

@dataclass
class Labels:
    undiscovered: float = 0.0
    tpr: float = 1.0
    fpr: float = 0.0

@dataclass
class Config:
    labels: Labels = field(default_factory=Labels)
    models: list = field(default_factory=lambda: ["plain", "data_filter", "sgtm"])
    rows: dict = field(default_factory=dict)
    size: int = 1
    sleep: float = 0.0
    fail_at: int = -1
    seed: int = 0
    out: str = ""
    name: str = ""
    overwrite: bool = False

if __name__ == "__main__":
    given = dict(a[2:].split("=", 1) for a in sys.argv[1:])
    seed, models = int(given["seed"]), json.loads(given.get("models", '["plain", "data_filter", "sgtm"]'))
    path = os.path.join(given["out"], given["name"])
    os.makedirs(path, exist_ok=True)
    with open(path + "/starts", "a") as file:
        file.write("x")
    with open(path + "/config.yaml", "w") as file:
        json.dump({"models": models, "gradsurgery": os.environ.get("FAKE_VERSION", "@VERSION@")}, file)
    time.sleep(float(given.get("sleep", 0)))
    if seed == int(given.get("fail_at", -1)):
        sys.exit("DataError: as I was told")
    share, size = float(given.get("labels.undiscovered", 0)), int(given.get("size", 1))
    tpr, fpr = float(given.get("labels.tpr", 1)), float(given.get("labels.fpr", 0))
    base = 8 * (100 * size) ** -0.5
    results = {}
    for model in models:
        learned = {"plain": 1.0, "data_filter": share, "sgtm": 0.2 * share}[model]
        forget = base + 3 * (1 - learned) + seed + (1 - tpr) + fpr
        one = {"es": forget, "en": base + 0.1 * models.index(model), "fr": base + 2}
        before = {name: value - 1 for name, value in one.items()} if model == "sgtm" else one
        results[model] = {
            "before": before, "flops": 100.0 * size, "tokens_per_second": 1.0,
            "roles": {"forget": ["es"], "adjacent": [], "retain": ["en", "fr"]},
            "tokens": {"all": 2e3, "forget": 1e3, "undiscovered": 1e3 * share},
            "token_losses": {"at": [0.0, 1.0], "density": {"es": [0.5, 0.5]}},
            "grad_norms": {"forget": {"es": [0.1, 0.2], "en": [0.01, 0.02]}, "other": {"es": [0.1], "en": [0.2]}},
        }
        if model == "sgtm":
            results[model]["after"] = one
        if model != "plain":
            curve = [{"step": s, "forget": forget - 0.1 * s, "retain": 1.0} for s in (0, 5, 10)]
            results[model]["relearn"] = {"steps": 10 if seed else None, "level": base + seed, "curve": curve}
    with open(path + "/metrics.jsonl", "w") as file:
        for model in models:
            for step in (1, 2):
                losses = {f"eval/{k}": v + 1 / step for k, v in results[model]["before"].items()}
                if model == "sgtm":
                    losses |= {f"eval/removed/{k}": v + 1 / step for k, v in results[model]["after"].items()}
                file.write(json.dumps({"model": model, "step": step, **losses}) + "\\n")
    with open(path + "/results.json", "w") as file:
        json.dump(results, file)
"""


def write(folder: Path, **parts: Any) -> Path:
    (folder / "fake.py").write_text(FAKE.replace("@VERSION@", __version__))
    given = {"recipe": "fake.py", "out": str(folder / "out"), **parts}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(given))
    return folder / "sweep.yaml"


def starts(sweep: Any) -> list[int]:
    return [
        len((cell.path / "starts").read_text()) if (cell.path / "starts").is_file() else 0 for cell in sweep.cells()
    ]


def test_cells_are_all_combinations_with_every_seed(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        fixed={"labels": {"tpr": 0.5}, "rows": {"a": 1}},
        grid={"labels.undiscovered": [0.0, 0.1], "size": [1, 2, 3]},
        seeds=[0, 1],
    )
    sweep = read_sweep(path)
    cells = sweep.cells()
    assert len(cells) == 12 == len({cell.name for cell in cells})
    assert sweep.fixed == {"labels.tpr": 0.5, "rows": {"a": 1}}  # rows is an option by itself
    assert {'--rows={"a": 1}', "--labels.tpr=0.5", "--seed=0", "--size=1"} <= set(cells[0].command())
    assert cells[0].command(ranks=2)[1:3] == ["-m", "torch.distributed.run"]


def test_a_list_of_grids_trains_once_what_settings_share(tmp_path: Path) -> None:
    """Plain training is the same whatever carries a label: one cell has it, and the others are measured against it."""
    grids = [
        {"labels.undiscovered": [0.0], "models": [["plain", "data_filter", "sgtm"]], "sleep": [0.01]},
        {"labels.undiscovered": [0.1, 0.5], "models": [["data_filter", "sgtm"]]},
        {"labels.undiscovered": [0.5], "models": [["sgtm", "plain"]]},
    ]
    sweep = read_sweep(write(tmp_path, grid=grids, seeds=[0, 2]))
    assert len(sweep.cells()) == 8 and sweep.varied() == {"labels.undiscovered"}
    found = collect(run_sweep(sweep, say=lambda line: None))
    assert all(list(one.setting) == ["labels.undiscovered"] for one in found)
    have = {(one.setting["labels.undiscovered"], one.model) for one in found}
    assert have == {(0.0, "plain"), (0.5, "plain")} | {(s, m) for s in (0.0, 0.1, 0.5) for m in ("data_filter", "sgtm")}
    assert len(found) == 2 * len(have)  # sgtm at 0.5 is in two cells, and counts once
    assert [leak.value for _, leak in leakages(found)] == pytest.approx([0.2] * 4)


def test_how_far_left_by_hand(tmp_path: Path) -> None:
    """Both curves fall by half a nat at once, so SGTM, 0.05 right of the filter, lies left of it by being higher."""
    found = collect(run_sweep(read_sweep(write(tmp_path, grid={"labels.undiscovered": [0.1]})), say=lambda line: None))
    curves = {one.model: one.curve for one in found}
    higher = 3 * (0.1 - 0.02)
    moved = [(p.forget + higher, p.retain + 0.05) for p in curves["data_filter"]]
    assert [(p.forget, p.retain) for p in curves["sgtm"]] == [pytest.approx(pair) for pair in moved]
    (row,) = gap_rows(found)
    # slope 1: at equal forget loss the filter's retain loss is `higher` more, of which 0.05 are lost again
    assert row["retain loss less at equal forget loss"] == f"{higher - 0.05:.3f}" and row["left in"] == "1 of 1"
    assert row["against"] == "data_filter"
    assert row["forget loss more at equal retain loss"] == f"{higher - 0.05:.3f}" and row["above in"] == "1 of 1"


def test_what_is_done_is_not_done_again_and_the_rest_is(tmp_path: Path) -> None:
    path = write(tmp_path, grid={"size": [1, 2]}, seeds=[0, 1], fixed={"fail_at": 1})
    sweep = read_sweep(path)
    said: list[str] = []
    with pytest.raises(DataError, match=r"2 of 4 runs failed; .*seed1.*: DataError: as I was told"):
        run_sweep(sweep, processes=2, say=said.append)
    assert starts(sweep) == [1, 1, 1, 1] and [finished(cell) for cell in sweep.cells()] == [True, False] * 2
    assert said[0] == "4 runs, 0 done before" and "4/4" in said[-1] and "left" in said[-1]
    with pytest.raises(DataError, match="2 of 2 runs failed"):
        run_sweep(sweep, say=said.append)
    assert starts(sweep) == [1, 2, 1, 2]


def test_a_killed_sweep_goes_on_and_never_runs_a_cell_twice_at_once(tmp_path: Path) -> None:
    """The runs outlive a killed sweep; the next one waits for them."""
    path = write(tmp_path, seeds=[0, 1, 2], fixed={"sleep": 1.5})
    code = f"from gradsurgery.runs.sweep import *; run_sweep(read_sweep({str(path)!r}))"
    sweep = read_sweep(path)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as going:
        deadline = time.time() + 120
        while sum(starts(sweep)) < 2 and time.time() < deadline:
            time.sleep(0.02)
        going.send_signal(signal.SIGKILL)
    assert not finished(sweep.cells()[1])
    run_sweep(sweep, say=lambda line: None)
    assert starts(sweep) == [1, 1, 1] and all(finished(cell) for cell in sweep.cells())


def test_runs_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read_sweep(write(tmp_path, seeds=[0, 1]))
    monkeypatch.setenv("FAKE_VERSION", "0.0.1")
    with pytest.raises(ArtefactError, match=r"begun with gradsurgery 0.0.1, this is"):
        run_sweep(sweep, say=lambda line: None)


def test_figures_over_seeds_by_hand(tmp_path: Path) -> None:
    """forget = base + 3 (1 - learned) + seed, over seeds 0 and 2: mean + 1, standard deviation sqrt(2)."""
    sweep = read_sweep(write(tmp_path, grid={"labels.undiscovered": [0.0, 0.1, 0.5]}, seeds=[0, 2]))
    found = collect(run_sweep(sweep, say=lambda line: None))
    rows = loss_rows(found)
    assert rows[0] == {
        "labels.undiscovered": 0.0,
        "model": "plain",
        "stage": "",
        "seeds": 2,
        "forget loss": "1.800 ± 1.414",
        "adjacent loss": None,
        "retain loss": "1.800 ± 0.000",
    }
    assert [r["stage"] for r in rows if r["model"] == "sgtm"] == ["before removal", "after removal"] * 3
    # a filter with a share s has learned s, SGTM a fifth of it: leakage 0.2 by construction
    assert [leak.value for _, leak in leakages(found)] == pytest.approx([0.2] * 4)
    assert all(leak.bound == "=" for _, leak in leakages(found))
    table = write_sweep_report(sweep)
    assert "after removal" in table and "1.800 ± 1.414" in table
    report = (sweep.out / "report.html").read_text(encoding="utf-8")
    for said in ("Leakage (equation 1", "0.2000 ± 0.0000", "Relearning: steps", "10.0 ± 0.0", "6 of 6 runs"):
        assert said in report
    assert (sweep.out / "table.md").read_text(encoding="utf-8").count("\n## ") == 3  # after the first: a heading each
    assert report.count("data:image/png;base64,") == 3 * 4 + 2 and "https://" not in report
    captions = list(draw(found))
    assert captions[0] == "Forget against retain loss along the checkpoints (labels.undiscovered=0.0)"
    curve = next(one.curve for one in found if one.model == "sgtm")
    assert curve[-1].forget == found[2].result["after"]["es"] + 0.5  # removed, not as it is trained


def test_penalties_by_hand(tmp_path: Path) -> None:
    """Plain retain losses are 1 + 8 C^-0.5; those of sgtm, third of the models, half of 0.2 above."""
    sweep = read_sweep(write(tmp_path, grid={"size": [1, 4, 16, 64]}))
    bars, rows = penalties(collect(run_sweep(sweep, say=lambda line: None)))
    curve = ScalingCurve(1.0, 8.0, 0.5, 0.0, (100.0, 6400.0), 4)
    expected = 1 - curve.compute(curve.loss(6400.0) + 0.1) / 6400
    assert bars["retain"]["sgtm"] == pytest.approx(expected, rel=1e-3)
    assert next(r for r in rows if r["role"] == "retain")["residual of the curve"] < 1e-6


def test_rates_are_a_heat_map(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, grid={"labels.tpr": [0.5, 1.0], "labels.fpr": [0.0, 0.2]}))
    figures = draw(collect(run_sweep(sweep, say=lambda line: None)))
    figure = figures["Forget loss of sgtm by detector rates"]
    written = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(written) == ["3.80", "4.00", "4.30", "4.50"]  # 0.8 + 3 + (1 - tpr) + fpr
    assert figure.axes[0].get_xlabel() == "false positive rate"
    assert "Forget loss of sgtm minus that of data_filter by detector rates" in figures


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"grid": {"labels.undiscoverd": [0.1]}}, "no option 'labels.undiscoverd'; did you mean labels.undiscovered"),
        ({"fixed": {"label": {"tpr": 1}}}, "no option 'label.tpr'"),
        ({"grids": {}}, "no 'grids'; did you mean grid"),
        ({"grid": {"size": []}}, "none of them empty"),
        ({"grid": {"size": 3}}, "list of values"),
        ({"grid": [{"size": [1]}, {"size": 3}]}, "list of values"),
        ({"grid": [{"size": [1]}, {"size": [2, 1]}]}, "twice"),
        ({"grid": [{"size": [1]}, {"sise": [1]}]}, "no option 'sise'; did you mean size"),
        (
            {"grid": [{"size": [1, 2]}, {"size": [2], "sleep": [1.0]}]},
            "train data_filter, plain, sgtm with and without sleep",
        ),
        ({"grid": {"size": [1, 1]}}, "twice"),
        ({"grid": {"seed": [1]}}, "seeds"),
        ({"fixed": {"out": "x"}}, "set by the sweep"),
        ({"fixed": {"size": 1}, "grid": {"size": [1]}}, "both fixed and in the grid"),
        ({"seeds": ["a"]}, "whole numbers"),
        ({"recipe": "nowhere.py"}, "nowhere.py is no file"),
        ({"recipe": str(Path(module.__file__))}, "no dataclass Config"),
        ({"fixed": [1]}, "options with their values"),
    ],
    ids=str,
)
def test_bad_sweeps(tmp_path: Path, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_sweep(write(tmp_path, **parts))


def test_other_bad_input(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "broken.yaml").write_text("a: [")
    for name, said in (("list", "is no sweep"), ("broken", "no YAML"), ("nowhere", "cannot be read")):
        with pytest.raises(DataError, match=said):
            read_sweep(tmp_path / f"{name}.yaml")
    sweep = read_sweep(write(tmp_path))
    with pytest.raises(DataError, match="no result yet"):
        write_sweep_report(sweep)
    with pytest.raises(DataError, match="processes=0"):
        run_sweep(sweep, processes=0)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert read_sweep(path).cells()


def test_a_real_sweep_at_smoke_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the README, on two short files."""
    for language, words in (("en", "in the beginning was the word "), ("es", "en el principio era el verbo ")):
        rows = [{"id": str(k), "text": f"{words * 6}{k}."} for k in range(120)]
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 16,
        "attention_types": [[["global"], 1]],
    }
    fixed = {
        "data": str(tmp_path / "text"),
        "text": {"validation": 0.2, "test_rows": 8},
        "model": {"context": 32, "options": options},
        "train": {"steps": 2, "eval_every": 1, "eval_rows": 4, "save_every": 0},
        "sgtm.neurons": 4,
    }
    given = {"recipe": "recipes/sgtm_bilingual.py", "fixed": fixed, "grid": {"labels.undiscovered": [0.0, 0.2]}}
    (tmp_path / "smoke.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(tmp_path / "smoke.yaml"), "--out", str(tmp_path / "out")])
    runpy.run_path("recipes/sweep.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "2/2" in printed and "after removal" in printed
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Leakage by undiscovered share" in report and report.count("data:image/png") == 2 * 2 + 2
    results = [json.loads(p.read_text()) for p in (tmp_path / "out" / "runs").glob("*/results.json")]
    assert len(results) == 2 and all(set(r) == {"plain", "sgtm", "data_filter"} for r in results)
