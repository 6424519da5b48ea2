"""The topic recipe at smoke size: every baseline and protocol, Wikipedia's format, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradsurgery.data import load_tokenizer, load_topics
from gradsurgery.errors import DataError, GradsurgeryError, PlanError
from gradsurgery.runs.removal_models import VARIANTS, rmu_place

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs" / "sgtm_topics").glob("*.yaml"))
TINY: dict[str, Any] = {
    "text.limit": 40,
    "text.test_rows": 8,
    "text.tokenizer": "embedded",
    "model.context": 32,
    "model.options": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 16,
        "attention_types": [[["global"], 2]],
    },
    "sgtm.neurons": 4,
    "train.steps": 4,
    "train.eval_every": 2,
    "train.eval_rows": 4,
    "train.log_every": 1,
    "train.save_every": 0,
    "unlearn.steps": 2,
}
PROBED: dict[str, Any] = {
    "protocols.calibration": 2,
    "protocols.relearn": 2,
    "protocols.relearn_every": 1,
    "protocols.token_losses": True,
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load("sgtm_topics")


def parse(recipe: ModuleType, arguments: list[str]) -> Any:
    import jsonargparse

    return jsonargparse.auto_cli(recipe.Config, as_positional=False, args=arguments)


def configured(recipe: ModuleType, out: Path, **more: Any) -> Any:
    options = {**TINY, "out": out, "name": "run", **{k.replace("__", "."): v for k, v in more.items()}}
    return parse(
        recipe, [f"--{k}={json.dumps(v) if isinstance(v, dict | list | bool) else v}" for k, v in options.items()]
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the embedded entries, as a file of one's own: faster to read."""
    path = tmp_path_factory.mktemp("data") / "topics.jsonl"
    rows = [
        {"id": d.id, "text": d.text, "topic": topic}
        for topic, part in load_topics(limit=120).items()
        for d in (*part.train, *part.validation)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def same_parameters(a: Path, b: Path) -> set[str]:
    first, second = (dict(AutoModelForCausalLM.from_pretrained(p).named_parameters()) for p in (a, b))
    return {name for name in first if torch.equal(first[name], second[name])}


@pytest.fixture(scope="module")
def finished(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    recipe.main(configured(recipe, out, models=list(VARIANTS), **PROBED))
    return out / "run"


def test_every_model_is_trained_probed_and_reported(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == list(VARIANTS)
    for name, result in results.items():
        assert set(result["before"]) == {"forget", "adjacent", "retain"} == set(result["calibrated"])
        assert ("after" in result) == (name not in ("plain", "data_filter", "strict_filter"))
        assert ("relearn" in result) == (name != "plain")
        assert len(result["token_losses"]["density"]["forget"]) == len(result["token_losses"]["at"])
        assert result["tokens"]["forget"] == 4 * 32 * (2 if VARIANTS[name].after else 4)
    assert results["rmu"]["before"] == results["npo"]["before"] == results["plain"]["before"]
    explored = json.loads((finished / "data.json").read_text())
    assert {row["category"] for row in explored["sizes"]} == {"forget", "adjacent", "retain"} == set(explored["words"])
    assert explored["repeats"] == [] and "No held-back text" in (finished / "data.html").read_text(encoding="utf-8")
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/png;base64,") == 6 and "https://" not in report
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    sgtm = [m for m in lines if m["model"] == "sgtm" and "eval/forget" in m]
    assert [m["step"] for m in sgtm] == [2, 4] and {"eval/removed/forget", "eval/calibrated/retain"} <= set(sgtm[0])


def test_the_curve_after_removal_is_the_removed_model(finished: Path, recipe: ModuleType) -> None:
    """The last checkpoint, cut by zeroed activations, and the cut weights are one model; samples are the first rows."""
    from gradsurgery.evaluation import evaluate

    loaded = recipe.load_data(configured(recipe, finished.parent))
    model = AutoModelForCausalLM.from_pretrained(finished / "models" / "sgtm_removed")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = [m for m in lines if m["model"] == "sgtm" and "eval/removed/forget" in m][-1]
    for name, ids in loaded.held_back.items():
        assert evaluate(model, {name: ids[:4]})[name]["loss"] == pytest.approx(last[f"eval/removed/{name}"], rel=1e-5)


def test_unlearning_starts_from_plain_and_rmu_moves_what_it_should(finished: Path) -> None:
    models = finished / "models"
    plain = AutoModelForCausalLM.from_pretrained(models / "plain")
    same = same_parameters(models / "plain", models / "rmu")
    assert set(dict(plain.named_parameters())) - same == {"transformer.h.0.mlp.c_proj.weight"}
    assert not same_parameters(models / "plain", models / "npo")


def test_filters_leave_out_what_they_are_named_for(recipe: ModuleType, tmp_path: Path, small: Path) -> None:
    from gradsurgery.runs.removal_run import strict_rows

    loaded = recipe.load_data(configured(recipe, tmp_path, data=small, labels__undiscovered=0.5))
    weak, strict = loaded.rows, strict_rows(loaded)
    near = weak.category == weak.categories.index("adjacent")
    assert torch.equal(strict.forget, weak.forget | near) and not (strict.retain & strict.forget).any()


def test_calibration_has_sequences_of_its_own(recipe: ModuleType, tmp_path: Path, small: Path) -> None:
    for rows in (4, 8, 10**6):
        config = configured(recipe, tmp_path, data=small, text__limit=120, text__test_rows=rows, **PROBED)
        loaded = recipe.load_data(config)
        config.protocols.calibration = 0
        for name, ids in recipe.load_data(config).held_back.items():
            test, own = loaded.held_back[name], loaded.calibration[name]
            assert len(test) and len(own) and torch.equal(test, ids[: len(test)])
            assert not any(torch.equal(a, b) for a in test for b in own)


def test_rates_reach_the_labels(recipe: ModuleType, tmp_path: Path, small: Path) -> None:
    config = configured(recipe, tmp_path, data=small, text__limit=120, labels__tpr=0.5, labels__fpr=0.25)
    rows = recipe.load_data(config).rows
    is_forget = rows.category == rows.categories.index("forget")
    assert rows.forget[is_forget].float().mean().item() == pytest.approx(0.5, abs=0.1)  # by document, seen by sequence
    assert rows.forget[~is_forget].float().mean().item() == pytest.approx(0.25, abs=0.1)


def test_prepared_articles(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["STEM.Biology", "STEM.Chemistry", "Culture.Media"]
    (tmp_path / "t.csv").write_text("page_id,topic,score\n" + "".join(f"{p},{names[p % 3]},0.9\n" for p in range(300)))
    given = [{"id": p, "text": f"Article {p} " + "and the earth was without form " * 5} for p in range(300)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    options: dict[str, Any] = {"forget": ["STEM.Biology"], "adjacent": ["STEM.Chemistry"], "test_articles": 20}
    script, files = (
        load("prepare_wikipedia"),
        {"topics": str(tmp_path / "t.csv"), "articles": str(tmp_path / "pages.jsonl")},
    )
    script.main(**files, out=str(tmp_path / "wiki"), tokenizer="embedded", context=32, **options)
    assert ["STEM.Biology", "forget"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (tmp_path / "t.csv.enwiki.index").is_file()
    explored = json.loads((tmp_path / "wiki" / "data.json").read_text())
    documents = {(row["category"], row["side"]): row["documents"] for row in explored["sizes"]}
    assert documents["STEM.Biology", "validation"] == 20 == documents["Culture", "validation"]
    assert "Articles by topic" in (tmp_path / "wiki" / "data.html").read_text(encoding="utf-8")
    config = configured(recipe, tmp_path, data=tmp_path / "wiki", rows=8, models=["sgtm"])
    recipe.main(config)
    result = json.loads((tmp_path / "run" / "results.json").read_text())["sgtm"]
    assert set(result["after"]) == {"STEM.Biology", "STEM.Chemistry", "Culture"}
    config.model.context = 16
    with pytest.raises(DataError, match="prepared with context=32"):
        recipe.load_data(config)


def test_bad_input(recipe: ModuleType, tmp_path: Path, small: Path) -> None:
    cases: list[tuple[dict[str, Any], type[GradsurgeryError], str]] = [
        ({"models": ["sgtm", "rmu"]}, PlanError, "put plain before it"),
        ({"models": ["sgmt"]}, PlanError, "not 'sgmt'"),
        ({"models": []}, PlanError, "at least one"),
        ({"models": ["sgtm", "plain"], "protocols__relearn": 2}, PlanError, "put plain first"),
        ({"text__forget": ["animals"]}, DataError, "near ones: animal"),
        ({"text__adjacent": [], "models": ["strict_filter"]}, DataError, "strict_filter"),
        ({"labels__tpr": 2.0}, DataError, "tpr=2.0"),
        ({"data": "nowhere"}, DataError, "does not exist"),
    ]
    for k, (options, kind, said) in enumerate(cases):
        rows = {"forget": 4, "retain": 6} if options.get("text__adjacent") == [] else {"forget": 4, "retain": 4}
        with pytest.raises(kind, match=said):
            recipe.main(configured(recipe, tmp_path / str(k), **{"rows": rows, "data": small, **options}))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_parse_and_find_their_layers(recipe: ModuleType, path: Path) -> None:
    config = parse(recipe, ["--config", str(path)])
    if config.start_from is None:
        with torch.device("meta"):
            model = recipe.build_model(config, load_tokenizer())
        model.tie_weights()
        layer, trained = rmu_place(config, model)
        layers = config.model.options["num_layers"]
        assert layer == f"transformer.h.{(layers - 1) // 2}" and len(trained.parameters()) == min(3, (layers + 1) // 2)
