"""The bilingual recipe at smoke size: what it leaves behind, what it refuses, and that it resumes."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
TINY = {
    "text.limit": 250,
    "text.test_rows": 8,
    "model.context": 32,
    "model.options": json.dumps(
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 16,
            "attention_types": [[["global"], 2]],
        }
    ),
    "sgtm.neurons": 4,
    "train.steps": 6,
    "train.eval_every": 3,
    "train.eval_rows": 4,
    "train.save_every": 2,
    "train.log_every": 1,
}


def command(out: Path, **more: object) -> list[str]:
    options = {**TINY, "out": out, "name": "run", **{k.replace("__", "."): v for k, v in more.items()}}
    return [sys.executable, str(ROOT / "recipes/sgtm_bilingual.py"), *(f"--{k}={v}" for k, v in options.items())]


def run(out: Path, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, **more), capture_output=True, text=True, env=environment(), timeout=500)


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs")
    done = run(out)
    assert done.returncode == 0, done.stderr
    return out / "run", done.stdout


def test_held_back_text_that_is_trained_on_is_left_out(tmp_path: Path) -> None:
    """Each text stands in the file twice, under ids that the split deals to either side."""
    for language in ("en", "es"):
        texts = [f"{language} {k % 40} in the beginning was the word" for k in range(80)]
        rows = [{"id": str(k), "text": text} for k, text in enumerate(texts)]
        (tmp_path / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = runpy.run_path(str(ROOT / "recipes/sgtm_bilingual.py"), run_name="recipe")
    config = recipe["Config"](data=str(tmp_path))
    config.text.validation, config.model.context = 0.3, 8
    with pytest.warns(UserWarning, match="held-back documents are left out"):
        loaded = recipe["load_data"](config)
    assert loaded.explore().repeats == [] and all(len(ids) for ids in loaded.held_back.values())


def test_a_run_leaves_everything(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "results.json",
        "report.html",
        "data.html",
        "data.json",
        "models",
    }
    assert {p.name for p in (folder / "plots").iterdir()} == {"losses.png", "curves.png", "grad_norms.png"}
    for line in ("plain", "sgtm, before removal", "sgtm, after removal", "data_filter"):
        assert line in printed
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/png;base64,") == 3
    assert "http://" not in report and "https://" not in report
    steps = [
        m["step"] for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if m["model"] == "sgtm"
    ]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    assert not list(folder.rglob("*.part"))


def test_checkpoints_are_stock_ones_and_the_removed_one_is_what_was_evaluated(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for name in ("plain", "sgtm", "sgtm_removed", "data_filter"):
        model = AutoModelForCausalLM.from_pretrained(folder / "models" / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / "models" / name)
        ids = torch.tensor([tokenizer("In the beginning")["input_ids"]])
        assert torch.isfinite(model(input_ids=ids).logits).all()
        forget = [(n, p) for n, p in model.named_parameters() if n.endswith("c_fc.weight")]
        assert all(bool(p[-4:].any()) == (name != "sgtm_removed") for _, p in forget)


def test_the_same_command_resumes_and_another_configuration_is_refused(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    before = (folder / "results.json").read_bytes()
    again = run(folder.parent)
    assert again.returncode == 0 and (folder / "results.json").read_bytes() == before
    assert [line for line in again.stdout.splitlines() if "removal" in line] == [
        line for line in printed.splitlines() if "removal" in line
    ]
    other = run(folder.parent, seed=3)
    assert other.returncode == 1 and "seed=0" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "nowhere.jsonl"}, "does not exist"),
        ({"data": "hub:nobody/nothing"}, "local files"),
        ({"sgtm__neurons": 99}, "leave nothing"),
        ({"labels__undiscovered": 1.5}, "rate"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(tmp_path: Path, options: dict[str, object], said: str) -> None:
    done = run(tmp_path, **options, models="[sgtm]")
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


def test_two_ranks_train_what_one_would(tmp_path: Path, finished: tuple[Path, str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        launcher + command(tmp_path)[1:], capture_output=True, text=True, env=environment(), timeout=500
    )
    assert done.returncode == 0, done.stderr
    both, one = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", finished[0]))
    for name in ("plain", "sgtm", "data_filter"):
        for stage in {"before", "after"} & set(one[name]):
            assert both[name][stage] == pytest.approx(one[name][stage], abs=2e-4)  # six AdamW steps of rounding


@pytest.mark.slow
@pytest.mark.parametrize("when", range(4))
def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, finished: tuple[Path, str], when: int) -> None:
    with subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as going:
        wanted = tmp_path / "run" / "checkpoints" / ("plain", "plain", "sgtm", "data_filter")[when]
        deadline = time.time() + 200
        while not list(wanted.glob("checkpoint-*")) and going.poll() is None and time.time() < deadline:
            time.sleep(0.01 * (when + 1))
        going.send_signal(signal.SIGKILL)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    resumed, whole = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", finished[0]))
    for name in ("plain", "sgtm", "data_filter"):
        for stage in ("before", "after"):
            assert resumed[name].get(stage) == whole[name].get(stage)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    keys = [(m["model"], m["step"]) for m in lines if "loss" in m]
    assert len(keys) == len(set(keys)) == 18
