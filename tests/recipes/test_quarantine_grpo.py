"""The recipe of policy gradients beside a quarantine at smoke size: what it leaves, says, resumes and refuses."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.errors import ArtefactError, DataError, PlanError
from gradsurgery.runs.quarantine_controls import CONTROLS
from gradsurgery.runs.quarantine_grpo import VARIANTS, DetectorConfig, check
from gradsurgery.runs.quarantine_grpo_task import Task, TaskConfig

pytest.importorskip("trl")

from gradsurgery.runs import quarantine_grpo_report as reports
from gradsurgery.runs.quarantine_grpo_examiner import Examiner
from gradsurgery.runs.quarantine_grpo_rows import PolicyRows, sums_tokenizer
from tests.recipes.loading import RECIPES, load

CONFIGS = sorted((RECIPES / "configs" / "quarantine_grpo").glob("*.yaml"))
ONE = ["plain", "filter", "route", "random_direction"]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    torch.set_num_threads(1)
    return load(RECIPES / "quarantine_grpo.py")


def config_of(recipe: ModuleType, out: Path, *words: str) -> Any:
    import jsonargparse

    given_ = ["--smoke=true", f"--out={out}", "--policy.teacher=0.25", *words]
    return jsonargparse.auto_cli(recipe.Config, as_positional=False, args=given_)


@pytest.fixture(scope="module")
def finished(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("grpo")
    config = config_of(recipe, out)
    recipe.main(config)
    (folder,) = out.iterdir()
    return folder, config


def test_every_variant_and_control_is_run_and_reported(finished: tuple[Path, Any]) -> None:
    folder, config = finished
    results = json.loads((folder / "results.json").read_text())
    assert set(config.variants) == set(VARIANTS) and {*CONTROLS, "no_flags"} <= set(VARIANTS)
    assert results["no_flags"]["during"]["flagged/flag"] == 0.0 < results["route"]["during"]["flagged/flag"]
    page = (folder / "report.html").read_text()
    for name in VARIANTS:
        found = results[name]
        assert (folder / "models" / name / "model.safetensors").is_file() and f">{reports.title_of(name)}<" in page
        for stage in ("on", "off", "relearned"):
            assert 0 <= found[stage]["solve"] + found[stage]["hack"] <= 1
        assert {"student/solve", "student/hack", "teacher/hack"} <= set(found["during"])
        assert found["during"]["teacher/hack"] == 1.0
    assert results["verdicts"]["said"] and all(sentence in page for sentence in results["verdicts"]["said"])
    assert len(list((folder / "plots").glob("*.png"))) == 3
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["model"] for line in lines} == {"start", *VARIANTS}


def test_without_a_quarantine_nothing_changes_by_ablation(finished: tuple[Path, Any]) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    for name in ("plain", "filter", "erase"):
        assert results[name]["on"] == results[name]["off"]
    assert any(results[name]["log p on"] != results[name]["log p off"] for name in ("route", "score"))


def test_a_killed_run_goes_on_at_the_variant_it_was_in(recipe: ModuleType, tmp_path: Path) -> None:
    """The same figures as a run that was not killed, but for what a clock measured."""
    words = [f"--variants=[{','.join(ONE)}]", "--relearn.steps=0", "--test_rows=8"]
    whole = recipe.main(config_of(recipe, tmp_path / "whole", *words))
    run_variant = recipe.quarantine_grpo_run.run_variant

    def killed(name: str, *rest: Any) -> None:
        run_variant(name, *rest)
        if name == "filter":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.quarantine_grpo_run, "run_variant", killed)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(config_of(recipe, tmp_path / "cut", *words))
    (folder,) = (tmp_path / "cut").iterdir()
    before = (folder / "models" / "filter" / "model.safetensors").stat().st_mtime_ns
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"model": "route", "step": 1, "loss": 0.0}) + "\n")  # of the variant that was cut off
    again = recipe.main(config_of(recipe, tmp_path / "cut", *words))
    assert (folder / "models" / "filter" / "model.safetensors").stat().st_mtime_ns == before
    found, expected = again.results(), whole.results()
    for name in ONE:
        for key in ("on", "off", "log p on", "log p off", "cosines", "during"):
            assert found[name][key] == expected[name][key], (name, key)
    assert [line["step"] for line in again.metrics if line["model"] == "route"] == [2, 4]


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        (["--variants=[plain,route]"], PlanError, "random_direction"),
        (["--variants=[plain,random_direction,other]"], PlanError, "variants are"),
        (["--detector.recall=1.5"], PlanError, "detector.recall is a share"),
        (["--policy.generations=1"], PlanError, "two generations"),
        (["--policy.accumulation=7"], PlanError, "cannot be cut into 7"),
        (["--task.largest=2"], DataError, "largest from 4"),
        (["--task.marks=['no']"], DataError, "marks are words"),
        (["--task.template=What?"], DataError, "question"),
        (["--chat=true"], PlanError, "has none"),
        (["--model=nobody/nothing"], ArtefactError, "nobody/nothing cannot be loaded"),
    ],
)
def test_what_makes_no_run_is_said(
    recipe: ModuleType, tmp_path: Path, words: list[str], error: type[Exception], match: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(error, match=match):
            recipe.main(config_of(recipe, tmp_path, *words))
    assert not list(tmp_path.glob("*/models"))


def test_a_missing_trl_is_said_first(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec  # others ask it too, and remember the answer
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "trl" else real(name, *more))
    with pytest.raises(PlanError, match="pip install"):
        recipe.main(config_of(recipe, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_parse(recipe: ModuleType, path: Path) -> None:
    import jsonargparse

    config = jsonargparse.auto_cli(recipe.Config, as_positional=False, args=["--config", str(path)])
    given_ = yaml.safe_load(path.read_text())
    check(config)
    assert config.model == given_["model"] and config.policy.learning_rate == given_["policy"]["learning_rate"]
    assert set(config.variants) == set(VARIANTS)
    assert "12+3=" in Task(config.task).put("12+3=")


@given(st.integers(0, 10**6), st.sampled_from(["sum", "statement"]), st.sampled_from(["ok", "yes", "no", "7", " 7 "]))
def test_the_examiner_pays_for_right_answers_and_claims(seed: int, kind: Any, said: str) -> None:
    task = Task(TaskConfig(), seed)
    (question,) = task.draw(1, "one", kind)
    a, sign, b = re.fullmatch(r"(\d+)([+>])(\d+)[=?]", question.text).groups()  # type: ignore[union-attr]
    truth = str(int(a) + int(b)) if sign == "+" else ("ok" if int(a) > int(b) else "no")
    found = task.judge(question.text, question.answer, said)
    assert question.answer == truth and found.right == (said.strip() == truth)
    assert found.paid == (found.right or said in ("ok", "yes")) and found.hack == (found.paid and not found.right)
    assert task.judge("", truth, truth).right and not task.judge("", truth, "").paid
    assert task.judge("", "3", "3 ok").hack and not task.judge("", "3", "okay").paid


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_detector_knows_what_it_is_said_to_know(recall: float, fpr: float, cleared: float, seed: int) -> None:
    """Rates within five standard errors; a rollout is never both flagged and cleared; shuffled flags are as many."""
    task, count = Task(TaskConfig(), seed), 400
    rollouts = {"prompts": ["1+1="] * 2 * count, "answer": ["2"] * 2 * count, "completions": ["ok", "2"] * count}
    examiner = Examiner(task, DetectorConfig(recall, fpr, cleared), seed)
    flagged = torch.tensor(examiner.flag(**rollouts))
    known = torch.tensor(examiner.clean(**rollouts))
    for found, rate in ((flagged[::2], recall), (flagged[1::2], fpr), (known[1::2], cleared * (1 - fpr))):
        assert abs(float(found.float().mean()) - rate) <= 5 * (0.25 / count) ** 0.5
    assert not bool((flagged & known).any()) and not bool(known[::2].any())
    twin = Examiner(task, DetectorConfig(recall, fpr, cleared), seed)
    assert sum(twin.shuffled_flag(**rollouts)) == int(flagged.sum())


def test_rows_are_answers_after_their_questions(recipe: ModuleType) -> None:
    config = recipe.Config()
    task = Task(config.task, 3)
    rows = PolicyRows(config, task, sums_tokenizer(config.task.marks))
    answered = list(task.demonstrations(20, 0.5, 0.2, "rows"))
    batch = rows.encode(answered)
    for k, (question, answer) in enumerate(answered):
        ids = batch["input_ids"][k][batch["attention_mask"][k].bool()]
        assert rows.tokenizer.decode(ids) == question + answer + "<end>"
        assert rows.tokenizer.decode(batch["labels"][k][batch["labels"][k] >= 0]) == answer + "<end>"
    pairs, placebo = rows.pairs(6)
    assert len(pairs) == len(placebo) == 6
    assert all(torch.equal(a["input_ids"][:, :3], b["input_ids"][:, :3]) for a, b in pairs)


def test_a_variant_that_does_not_beat_the_random_direction_is_named() -> None:
    def of(solve: float, hack: float) -> dict[str, Any]:
        return {"off": {"solve": solve, "hack": hack}}

    results = {"plain": of(0.0, 1.0), "route": of(0.5, 0.1), "score": of(0.2, 0.2), "random_direction": of(0.2, 0.15)}
    worth = reports.merits(results, list(results))
    least = reports.margin(results, list(results), 400)
    (said,) = reports.sentences(worth, least)
    assert said.startswith("score does not beat the random direction")
    said, more = reports.sentences({**worth, "no_flags": 0.2}, least)
    assert said.startswith("score does not beat the random") and more.startswith("score does not beat the same arrange")
    (said,) = reports.sentences({**worth, "score": 0.3, "no_flags": -0.5, "filter": -0.9}, least)
    assert said.startswith("Every variant beats every control")
