"""The supervised recipe with a quarantine at smoke size: data, what it leaves, its controls, what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import gradsurgery as gs
from gradsurgery import data
from gradsurgery.data.split import Split
from gradsurgery.errors import ArtefactError, DataError, GradsurgeryError, PlanError
from gradsurgery.runs.quarantine_controls import CONTROLS, placebo_of, shuffled, verdicts
from gradsurgery.runs.quarantine_sft import VARIANTS, TextConfig, require
from gradsurgery.runs.quarantine_sft_report import merits
from gradsurgery.runs.quarantine_sft_rows import bilingual, load_data, nearest
from gradsurgery.runs.quarantine_sft_start import losses_of
from tests.recipes.loading import RECIPES, SHAPE, load

SCRIPT = RECIPES / "quarantine_sft.py"
CONFIGS = sorted((RECIPES / "configs" / "quarantine_sft").glob("*.yaml"))
SMOKE = {
    "smoke": "true",
    "base.model.options": json.dumps(SHAPE),
    "adapter.modules": '["q_proj", "c_fc"]',
    "adapter.rank": "4",
    "adapter.quarantine_rank": "4",
    "text.limit": "150",
}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load(SCRIPT)


def words(out: Path, **more: str) -> list[str]:
    given_options = {**SMOKE, "out": str(out), "name": "run", **{k.replace("__", "."): v for k, v in more.items()}}
    return [f"--{name}={value}" for name, value in given_options.items()]


def parse(recipe: ModuleType, out: Path, **more: str) -> Any:
    import jsonargparse

    return jsonargparse.auto_cli(recipe.Config, as_positional=False, args=words(out, **more))


@pytest.fixture(scope="module")
def finished(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant."""
    out = tmp_path_factory.mktemp("quarantine")
    recipe.main(parse(recipe, out))
    return out / "run"


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_a_run_leaves_everything(finished: Path) -> None:
    found = results(finished)
    assert set(found) == {"start", "verdicts", *VARIANTS}
    assert {path.name for path in finished.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "plots",
        "models",
    }
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in VARIANTS) and "http://" not in page and page.count("data:image/png") == 3
    for sentence in found["verdicts"]["said"]:
        assert sentence in page
    for name, variant in VARIANTS.items():
        figures = found[name]
        assert figures["relearn"]["curve"] and figures["adapter"]["capacity"]["parameters"] == 1.0
        assert figures["adapter"]["capacity"]["learning_rate"] == pytest.approx(
            0.15 * figures["adapter"]["capacity"]["frobenius"]
        )
        assert ("energy" in figures["during"]) == (variant.mode != "erase")
        assert ("flagged/forget" in figures["during"]) == (variant.mode in ("route", "absorb"))
        assert ("score/forget" in figures["during"]) == variant.scores
        assert {"log_probability/forget", "log_probability/retain"} <= set(figures["during"])
    assert found["verdicts"]["merits"] == pytest.approx(merits(found, list(VARIANTS)))


def test_labels_flag_what_they_should(finished: Path) -> None:
    """No English row is flagged with a false positive rate of zero; shuffled labels flag as many rows of all."""
    found = results(finished)
    for name in ("route", "absorb", "label_and_score"):
        assert found[name]["during"]["flagged/retain"] == 0.0 < found[name]["during"]["flagged/forget"]
    assert found["shuffled_labels"]["during"]["flagged/retain"] > 0


def test_what_is_saved_is_what_was_measured_without_the_quarantine(recipe: ModuleType, finished: Path) -> None:
    config = recipe.toy(parse(recipe, finished.parent))
    loaded, found = load_data(config), results(finished)
    for name in ("plain", "route", "score"):
        model = AutoModelForCausalLM.from_pretrained(finished / "models" / name)
        assert losses_of(model, loaded.held_back) == pytest.approx(found[name]["off"], abs=1e-5)
        start = AutoModelForCausalLM.from_pretrained(next(finished.parent.glob("base-*")) / "models" / "start")
        with gs.adapters.load(finished / "models" / f"{name}-adapter.safetensors", start):
            assert losses_of(start, loaded.held_back) == pytest.approx(found[name]["on"], abs=1e-5)
    start = AutoModelForCausalLM.from_pretrained(next(finished.parent.glob("base-*")) / "models" / "start")
    assert losses_of(start, loaded.held_back) == pytest.approx(found["start"]["on"], abs=1e-5)


def test_the_same_command_goes_on_where_it_was(recipe: ModuleType, finished: Path, tmp_path: Path) -> None:
    """Nothing is done twice, and what is missing is done to the same figures."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    folder, before = tmp_path / "copy" / "run", results(finished)
    recipe.main(parse(recipe, tmp_path / "copy"))
    assert results(folder) == before
    kept = {name: of for name, of in before.items() if name not in ("score", "verdicts")}
    (folder / "results.json").write_text(json.dumps(kept))
    recipe.main(parse(recipe, tmp_path / "copy"))
    again = results(folder)
    for part in ("on", "off", "relearn", "cosines", "during"):
        assert again["score"][part] == before["score"][part]
    with pytest.raises(ArtefactError, match="seed"):
        recipe.main(parse(recipe, tmp_path / "copy", seed="7"))


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 5))
def test_the_detector_is_a_dial(recall: float, fpr: float, seed: int) -> None:
    kinds = ["forget"] * 40 + ["retain"] * 60
    noise = data.Noise(tpr=recall, fpr=fpr)
    labels = data.label_rows(kinds, forget="forget", noise=noise, seed=seed)
    rates = gs.evaluation.DetectorRates.of_labels(labels.forget, torch.tensor([kind == "forget" for kind in kinds]))
    assert rates.tpr == int(recall * 40 + 0.5) / 40 and rates.fpr == int(fpr * 60 + 0.5) / 60
    dealt = shuffled(labels.forget, seed)
    assert dealt.sum() == labels.forget.sum() and torch.equal(dealt, shuffled(labels.forget, seed))


def test_legitimate_text_close_to_the_forget_language() -> None:
    """Held-back sentences alone, with more of the other language's words than is usual."""
    corpus = data.load_bilingual(validation=0.1, limit=120)
    documents = nearest(corpus["en"], corpus["es"], 0.2)
    every = nearest(corpus["en"], corpus["es"], 1.0)
    known = Counter(word for d in corpus["es"].train for word in re.findall(r"[^\W\d_]+", d.text.lower()))
    often = {word for word, count in known.items() if count >= 5}

    def alike(text: str) -> float:
        found = re.findall(r"[^\W\d_]+", text.lower())
        return sum(len(word) for word in found if len(word) > 3 and word in often) / sum(map(len, found))

    held = {d.id for d in corpus["en"].validation}
    assert {d.id for d in documents} <= held and len(documents) <= len(every)
    near, usual = (sum(alike(d.text) for d in found) / len(found) for found in (documents, every))
    assert near > usual
    with pytest.raises(DataError, match="share"):
        nearest(corpus["en"], corpus["es"], 0.0)


def test_pairs_are_translations_and_placebos_are_not(recipe: ModuleType, tmp_path: Path) -> None:
    loaded = load_data(recipe.toy(parse(recipe, tmp_path)))
    forget, retain = (set(map(tuple, loaded.rows.input_ids[loaded.rows.of(k)].tolist())) for k in ("forget", "retain"))
    assert not forget & retain and len(loaded.pairs) == len(loaded.placebo) == 4
    wanted = {tuple(pair[1]["input_ids"][0].tolist()) for pair in loaded.pairs}
    for one, other in loaded.placebo:
        sides = tuple(one["input_ids"][0].tolist()), tuple(other["input_ids"][0].tolist())
        assert set(sides) <= wanted and sides[0] != sides[1]
    with pytest.raises(PlanError, match="two batches"):
        placebo_of([{}])


def test_topics(recipe: ModuleType, tmp_path: Path) -> None:
    """Their near text is the adjacent topics', which may be trained on, too."""
    more = {"text__kind": "topics", "text__limit": "60", "rows": "{retain: 4, forget: 4, adjacent: 2}"}
    chosen = {**more, "variants": "[plain,route,random_direction]"}
    recipe.main(parse(recipe, tmp_path, **chosen))
    found = results(tmp_path / "run")
    assert set(found["route"]["off"]) == {"forget", "retain", "near"}
    assert found["route"]["during"]["flagged/adjacent"] == 0.0
    with pytest.raises(DataError, match="adjacent"):
        load_data(recipe.toy(parse(recipe, tmp_path, **{**more, "text__adjacent": "[]"})))


@given(st.fixed_dictionaries({}, optional={name: st.floats(-2, 2) for name in VARIANTS}), st.floats(0, 1))
def test_who_does_not_beat_a_control_is_named(worth: dict[str, float], margin: float) -> None:
    said = verdicts(worth, "nats", margin)
    beaten = {
        (name, control)
        for name in worth
        for control in CONTROLS
        if name not in ("plain", *CONTROLS) and control in worth and worth[name] <= worth[control] + margin
    }
    assert len(said) == max(len(beaten), 1)
    for name, control in beaten:
        assert any(line.startswith(f"{name} does not beat the {control.replace('_', ' ')}") for line in said)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"variants": "[plain,random_direction,magic]"}, PlanError, "magic"),
        ({"variants": "[plain,route]"}, PlanError, "random_direction"),
        ({"variants": "[plain,plain,random_direction]"}, PlanError, "once"),
        ({"labels__recall": "1.5"}, DataError, "rate"),
        ({"text__source": "nowhere.jsonl"}, GradsurgeryError, "does not exist"),
        ({"text__forget": "[fr]"}, DataError, "category"),
        ({"adapter__rank": "99"}, PlanError, "more than"),
        ({"model": "nobody/nothing"}, ArtefactError, "cannot be loaded"),
        ({"text__context": "20000"}, DataError, "do not fill|shorter"),
    ],
    ids=str,
)
def test_bad_input(
    recipe: ModuleType, finished: Path, tmp_path: Path, more: dict[str, str], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        recipe.main(parse(recipe, tmp_path, **more))


def test_variants_stand_with_their_controls() -> None:
    require(list(VARIANTS))
    assert CONTROLS == ("random_direction", "shuffled_labels", "placebo_pairs")
    corpus = {"retain", "forget", "near"}
    assert set(bilingual(TextConfig(limit=60))) == corpus
    assert isinstance(bilingual(TextConfig(limit=60))["near"], Split)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_of_the_hub(recipe: ModuleType, path: Path, tmp_path: Path) -> None:
    """They parse offline, and say what is missing."""
    import jsonargparse

    given_options = yaml.safe_load(path.read_text())
    words_of = ["--config", str(path), f"--out={tmp_path}", f"--text.source={tmp_path / 'nothing.jsonl'}"]
    config = jsonargparse.auto_cli(recipe.Config, as_positional=False, args=words_of)
    assert config.model == given_options["model"] and config.train.steps == given_options["train"]["steps"]
    assert config.adapter.quarantine_rank <= config.adapter.rank
    with pytest.raises(GradsurgeryError):
        recipe.main(config)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["plain", "route", "score"])
def test_a_killed_run_resumes_to_the_same_figures(finished: Path, tmp_path: Path, when: str) -> None:
    command = [sys.executable, str(SCRIPT), *words(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment}
    with subprocess.Popen(command, **pipes) as going:
        wanted, deadline = tmp_path / "run" / "checkpoints" / when, time.time() + 300
        while not list(wanted.glob("checkpoint-*/trainer_state.json")) and going.poll() is None:
            assert time.time() < deadline
            time.sleep(0.01)
        going.send_signal(signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    resumed, whole = results(tmp_path / "run"), results(finished)
    for name in VARIANTS:
        for stage in ("on", "off"):
            assert resumed[name][stage] == pytest.approx(whole[name][stage], abs=1e-6)
