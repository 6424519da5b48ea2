"""The recipe of opposed projection at smoke size: what it leaves behind, other models and data, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonargparse
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

from gradsurgery.errors import ArtefactError, DataError, GradsurgeryError, PlanError
from gradsurgery.losses.references import store
from gradsurgery.runs.opposed import VARIANTS
from tests.recipes.loading import RECIPES, SHAPE, load

SCRIPT = RECIPES / "opposed_projection.py"
CONFIGS = sorted((RECIPES / "configs" / "opposed").glob("*.yaml"))
SMOKE = {
    "smoke": "true",
    "start.model.options": json.dumps(SHAPE),
    "start.tokenizer": "train:400",
    "topics.kept": "[plant]",
    "topics.answered": "[food]",
    "name": "run",
}
TRAINED = ("finetune", "conflict", "both_update", "mixed", "safegrad")
FAST = (
    "--train.steps=2", "--train.epochs=0", "--train.eval_every=0", "--train.save_every=0", "--train.log_every=1",
    "--train.eval_rows=2", "--rows=4", "--plain_rows=2", "--test_rows=2", "--test_prompts=2", "--eval_prompts=1",
    "--max_new_tokens=3", "--observe_every=1", "--validation=0.3",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load(SCRIPT)


def parse(recipe: ModuleType, *words: str) -> Any:
    return jsonargparse.auto_cli(recipe.Config, as_positional=False, args=list(words))


def command(options: dict[str, Any]) -> list[str]:
    return [sys.executable, str(SCRIPT), *(f"--{k}={v}" for k, v in options.items())]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def run(where: Path, options: dict[str, Any], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    words = command(options)
    if ranks > 1:
        words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *words[1:]]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=500, cwd=where)


def folder_of(where: Path) -> Path:
    return where / "runs/opposed_projection/run"


def results_of(where: Path) -> dict[str, Any]:
    return json.loads((folder_of(where) / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    where = tmp_path_factory.mktemp("opposed")
    done = run(where, {**SMOKE, "variants": f"[{','.join(TRAINED)}]"})
    assert done.returncode == 0, done.stderr
    return where, done.stdout


def test_a_run_leaves_everything(finished: tuple[Path, str]) -> None:
    where, printed = finished
    folder, results = folder_of(where), results_of(where)
    assert set(results) == {"start", *TRAINED}
    topics = {"animal", "plant", "food"}
    for name, result in results.items():
        assert set(result["refusals"]) == topics and set(result["loss"]) == set(result["kl"]) == {*topics, "text"}
        assert result["detector"] == {"precision": 1.0, "recall": 1.0, "refusals": 24, "answers": 40}
        assert all(kl == 0 for kl in result["kl"].values()) == (name == "start")
        model = AutoModelForCausalLM.from_pretrained(folder / "models" / name)
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "models" / name)("What is")["input_ids"]])
        assert torch.isfinite(model(input_ids=ids).logits).all() and name in printed
    assert len(list((folder / "plots").iterdir())) == 3 and not list(folder.rglob("*.part"))
    assert "The refusal detector on its labelled set" in (folder / "report.html").read_text()


def test_gradients_and_updates_are_measured(finished: tuple[Path, str]) -> None:
    where, _ = finished
    lines = [json.loads(line) for line in (folder_of(where) / "metrics.jsonl").read_text().splitlines()]
    for name in TRAINED:
        keys = {key for line in lines if line["model"] == name for key in line}
        slot = "sft" if VARIANTS[name].mixed else "main"
        assert {"leak/protect", "changed_fraction", "eval/refusals of animal", "eval/KL elsewhere"} <= keys
        assert (f"project/{slot}/protect/cosine_before" in keys) == (VARIANTS[name].remove is not None)
        measured = results_of(where)[name]["gradients"]
        assert measured["changed fraction"] > 0.5 and -1 <= measured["cosine of the update"] <= 1
    after = results_of(where)["both_update"]["gradients"]
    assert abs(after["cosine after"]) < 1e-6 and abs(after["cosine of the update"]) < 1e-6


def test_the_start_is_shared_and_more_variants_can_be_added(finished, recipe, monkeypatch) -> None:
    where, _ = finished
    monkeypatch.chdir(where)
    before, start = results_of(where), folder_of(where) / "models/start/model.safetensors"
    written = start.stat().st_mtime_ns
    recipe.main(parse(recipe, *(f"--{k}={v}" for k, v in SMOKE.items()), "--variants=[finetune,script]"))
    after = results_of(where)
    assert start.stat().st_mtime_ns == written and after.pop("script") and after == before


def write(path: Path, count: int, **more: Any) -> Path:
    rows = [
        {"prompt": f"What is {k}?", "response": f"It is the number {k}.", "is_safe": k % 2 == 0, **more}
        for k in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_words(finished: tuple[Path, str], tmp_path: Path, *words: str) -> list[str]:
    """A run on the finished model with chat data of its own."""
    data = write(tmp_path / "chat.jsonl", 60)
    return [
        f"--model={folder_of(finished[0]) / 'models/start'}",
        f"--lifted.source={data}",
        "--lifted.where={is_safe: false}",
        f"--elsewhere={{safe: {{source: {data}, where: {{is_safe: true}}}}}}",
        "--kept=[safe]",
        f"--out={tmp_path / 'runs'}",
        "--name=run",
        *FAST,
        *words,
    ]


def test_every_kind_of_reference_gives_the_same(finished, tmp_path, recipe) -> None:
    """Also in a second stage, which does not begin where the reference is."""
    data = write(tmp_path / "plain.jsonl", 20)
    more = (f"--plain.source={data}", "--variants=[mixed]", "--train.learning_rate=1e-3", "--train.steps=3")
    second = ("--second.epochs=1", "--second.learning_rate=1e-3")
    found = {}
    for kind in ("frozen", "snapshot", "cached"):
        words = chat_words(finished, tmp_path, *more, *second, f"--reference={kind}", f"--name={kind}")
        found[kind] = recipe.main(parse(recipe, *words)).results()
    assert set(found["frozen"]) == {"start", "mixed", "mixed, second stage"}
    for kind in ("snapshot", "cached"):
        for name, result in found["frozen"].items():
            for what in ("loss", "kl"):  # KL of nearly equal models cancels in fp32
                assert found[kind][name][what] == pytest.approx(result[what], rel=1e-3, abs=1e-6)
    assert found["frozen"]["mixed, second stage"]["kl"]["lifted"] > found["frozen"]["mixed"]["kl"]["lifted"] > 0


def test_any_chat_model_and_data_set(finished, tmp_path, recipe) -> None:
    """With BeaverTails' columns, rates by depth, and weights in bf16 that a small rate does not move."""
    more = ("--train.depth_rates=[0.25,0.5,1]", "--dtype=bfloat16", "--reference=cached", "--top_k=8")
    words = chat_words(finished, tmp_path, *more, "--variants=[conflict]", "--train.learning_rate=1e-6")
    folder = recipe.main(parse(recipe, *words))
    results = folder.results()
    assert set(results) == {"start", "conflict"} and set(results["conflict"]["kl"]) == {"lifted", "safe"}
    assert results["conflict"]["gradients"]["changed fraction"] < 0.5
    assert "weights moved in a step of" in (folder / "report.html").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder / "models/conflict", dtype="auto").dtype == torch.bfloat16


def test_trackers_see_gradients_and_held_back_scores(finished, tmp_path, recipe, monkeypatch) -> None:
    seen: set[str] = set()

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.update(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    words = chat_words(finished, tmp_path, "--train.report_to=tensorboard", "--variants=[conflict]")
    folder = recipe.main(parse(recipe, *words, "--train.eval_every=1"))
    wanted = {"loss", "project/main/protect/cosine_before", "leak/protect", "eval/refusals of lifted"}
    assert wanted <= seen and wanted <= {key for line in folder.metrics for key in line}


def test_a_full_disk_leaves_no_half_cache(finished, tmp_path, recipe, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    words = chat_words(finished, tmp_path, "--reference=cached", "--variants=[conflict]")
    with pytest.raises(ArtefactError, match=r"could not be written.*No space left"):
        recipe.main(parse(recipe, *words))
    assert not [path for path in (tmp_path / "runs/run").iterdir() if "reference" in path.name]
    monkeypatch.undo()
    assert recipe.main(parse(recipe, *words)).results()["conflict"]


def test_a_teacher_with_other_tokens_is_refused(finished, tmp_path, recipe) -> None:
    where = folder_of(finished[0]) / "models/start"
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokenizer.add_tokens(["<new>"])
    AutoModelForCausalLM.from_pretrained(where).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    words = chat_words(finished, tmp_path, f"--teacher={tmp_path / 'teacher'}")
    with pytest.raises(DataError, match="401 entries and the model's 400"):
        recipe.main(parse(recipe, *words))


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--variants=[finetune,nonsense]"], PlanError, "nonsense"),
        (["--topics.lifted=weather"], DataError, "no topic weather"),
        (["--model=nowhere/at-all"], ArtefactError, "nowhere/at-all cannot be loaded"),
        (["--topics.kept=[animal]"], PlanError, "animal is named twice"),
        (["--model=MODEL", "--lifted.source=CHAT", "--context=3"], DataError, "at most 3 tokens"),
        (["--lifted.source=somewhere"], PlanError, "need a model"),
        (["--model=MODEL", "--lifted.source=EMPTY"], DataError, "empty"),
        (["--model=MODEL", "--lifted.source=CHAT", "--lifted.prompt=question"], DataError, "no column 'question'"),
        (["--model=MODEL", "--lifted.source=CHAT", "--kept=[x]"], PlanError, "kept names x"),
        (["--model=MODEL", "--elsewhere={a: {source: CHAT}}"], PlanError, "--lifted.source"),
        (["--model=MODEL", "--lifted.source=CHAT", "--variants=[mixed]"], PlanError, "--plain.source"),
        (["--model=MODEL", "--lifted.source=CHAT", "--variants=[safegrad]"], PlanError, "--elsewhere"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(finished, tmp_path, recipe, words, error: type[GradsurgeryError], said) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    names = {
        "MODEL": str(folder_of(finished[0]) / "models/start"),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "CHAT": str(write(tmp_path / "chat.jsonl", 30)),
    }
    for name, value in names.items():
        words = [word.replace(name, value) for word in words]
    with pytest.raises(error, match=said):
        recipe.main(parse(recipe, f"--out={tmp_path / 'runs'}", *FAST, *words))


def test_errors_reach_the_command_line_without_a_traceback(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--variants=[nonsense]"])
    with pytest.raises(SystemExit, match=r"PlanError: variants are .*, not nonsense\."):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_parse(recipe: ModuleType, path: Path) -> None:
    config = parse(recipe, "--config", str(path))
    assert set(config.variants) <= set(VARIANTS)
    given = yaml.safe_load(path.read_text())
    assert config.train.learning_rate == given["train"]["learning_rate"]


def test_gemma_is_configured_as_the_original(recipe: ModuleType) -> None:
    config = parse(recipe, "--config", str(RECIPES / "configs/opposed/gemma_beavertails.yaml"))
    assert (config.rows, config.context, config.lifted.limit, config.dtype) == (4, 512, 10_000, "bfloat16")
    assert config.train.schedule() == {"lr_scheduler_type": "linear"} and config.train.warmup == 0
    assert config.train.depth_rates == [0.25, 0.5, 0.75, 1.0] and config.train.max_grad_norm == 0
    assert (config.train.epochs, config.second.epochs, config.second.learning_rate) == (2, 5, 2e-6)
    assert "script" in config.variants and (config.positive_weight, config.unlearn_weight) == (1, 1)


def test_the_default_is_the_embedded_run(recipe: ModuleType) -> None:
    config = parse(recipe)
    assert config == recipe.Config() and config.model is None and config.variants[0] == "finetune"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["conflict", "both_update", "safegrad"])
def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, variant: str) -> None:
    options = {**SMOKE, "variants": f"[{variant}]"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for where in (whole, cut):
        where.mkdir()
    assert run(whole, options).returncode == 0
    with subprocess.Popen(
        command(options), env=environment(), cwd=cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as going:
        deadline = time.time() + 300
        checkpoints = folder_of(cut) / "checkpoints" / variant
        while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            assert going.poll() is None and time.time() < deadline
            time.sleep(0.005)
        going.send_signal(signal.SIGKILL)
    done = run(cut, options)
    assert done.returncode == 0, done.stderr
    once, resumed = results_of(whole)[variant], results_of(cut)[variant]
    for what in ("refusals", "loss", "kl", "gradients"):
        assert once[what] == resumed[what]


@pytest.mark.slow
def test_two_ranks_train_what_one_would(tmp_path: Path, finished: tuple[Path, str]) -> None:
    done = run(tmp_path, {**SMOKE, "variants": f"[{','.join(TRAINED)}]"}, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = results_of(finished[0]), results_of(tmp_path)
    for name in ("start", *TRAINED):
        for category, loss in one[name]["loss"].items():
            assert two[name]["loss"][category] == pytest.approx(loss, abs=2e-4)
