"""The recipe of WaRP at smoke size: what its phases leave and find, what stays where it is, what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, DataError, GradsurgeryError, PlanError, SelectionError
from gradsurgery.estimators import Basis
from gradsurgery.runs.warp import VARIANTS, expanded
from gradsurgery.runs.warp_layers import PROJECTIONS, layer_numbers, weights_of
from tests.recipes.loading import RECIPES, SHAPE, load

SCRIPT = RECIPES / "warp.py"
CONFIGS = sorted((RECIPES / "configs" / "warp").glob("*.yaml"))
SMOKE = {
    "smoke": "true",
    "behaviour.model.options": json.dumps(SHAPE),
    "behaviour.tokenizer": "train:400",
    "glosses.refused": "[plant]",
    "glosses.answered": "[food]",
    "glosses.task": "[body]",
    "basis.outputs": "true",
    "importance.ratios": "[0.05]",
}
TRAINED = ["full", "linear", "mask 5%", "warp 5%", "gpm", "actsvd", "mixed"]
KEEP = {"mask 5%": 0.05, "warp 5%": 0.05, "gpm": None, "actsvd": None}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load(SCRIPT)


def words(where: Path, **more: str) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMOKE, "out": str(where), **more}.items()]


def run(recipe: ModuleType, phase: str, where: Path, **more: str) -> Any:
    return recipe.main(*recipe.parse([phase, *words(where, **more)]))


def phase_of(where: Path, phase: str) -> Path:
    (found,) = where.glob(f"{phase}-*")
    return found


@pytest.fixture(scope="module")
def finished(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("warp")
    run(recipe, "all", where, variants="[full,linear,mask,warp,gpm,actsvd,mixed]")
    return where


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished phases, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())


def test_a_run_leaves_everything(finished: Path) -> None:
    folder = phase_of(finished, "train")
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["start", *TRAINED]
    for name, result in results.items():
        assert set(result["refusals"]) == {"protected", "food"}
        assert set(result["loss"]) == {"protected", "food", "task"} and 0 <= result["exact_match"] <= 1
        assert result["detector"] == {"precision": 1.0, "recall": 1.0, "refusals": 24, "answers": 40}
        if name != "start":
            assert result["seconds"] > 0 and result["peak_mib"] > 0
    curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in TRAINED:
        seen = [line["step"] for line in curve if line["model"] == name and "eval/loss of protected" in line]
        assert seen == [3, 6]
    report = (folder / "report.html").read_text()
    assert all(said in report for said in ("What the rotation adds", "Time and peak memory", "behaviour", "rank 90%"))
    assert not list(finished.rglob("*.part")) and not list(finished.rglob("checkpoint-*"))


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_kept_stays_and_what_is_not_moves(finished: Path, name: str) -> None:
    """Kept coordinates to 1e-6 of their norm; without a basis nothing moves, unless the variant trains everything."""
    folder, start = phase_of(finished, "train"), weights(phase_of(finished, "behaviour") / "models/start")
    trained = weights(folder / "models" / name.replace(" ", "_").rstrip("%"))
    result = json.loads((folder / "results.json").read_text())[name]
    with_basis = set(Basis.load(phase_of(finished, "basis") / "input.safetensors").sites)
    still = {parameter for parameter in start if torch.equal(start[parameter], trained[parameter])}
    assert still == (set() if name in ("full", "mixed") else set(start) - with_basis)
    assert ("kept" in result) == (name in KEEP)
    if name in KEEP:
        assert result["kept moved"] <= (0 if name.startswith("mask") else 1e-6)
        assert result["kept"] == pytest.approx(KEEP[name], rel=0.01) if KEEP[name] else 0 < result["kept"] < 1


def test_models_are_stock_checkpoints(finished: Path) -> None:
    for path in (phase_of(finished, "train") / "models").iterdir():
        ids = torch.tensor([AutoTokenizer.from_pretrained(path)("What is")["input_ids"]])
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits).all()


def test_finished_phases_are_found_and_left(copied: Path, recipe: ModuleType) -> None:
    """The same command does nothing again, and a later variant trains on the same phases."""
    files = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    run(recipe, "basis", copied), run(recipe, "importance", copied)
    before = json.loads((phase_of(copied, "train") / "results.json").read_text())
    run(recipe, "train", copied, variants="[mixed]")
    after = json.loads((phase_of(copied, "train") / "results.json").read_text())
    assert after == before
    changed = {path.name for path, at in files.items() if path.stat().st_mtime_ns != at}
    assert changed <= {"report.html"} | {path.name for path in (phase_of(copied, "train") / "plots").iterdir()}


def test_the_latest_phase_that_fits_is_taken(copied: Path, recipe: ModuleType) -> None:
    other = run(recipe, "basis", copied, layers="last")  # later, and of other layers
    assert len(list(copied.glob("basis-*"))) == 2
    folder = run(recipe, "importance", copied, overwrite="true")
    assert "importance" in folder.results()
    named = run(recipe, "importance", copied, layers="last", basis_run=str(other.path))
    assert named.path != folder.path and "importance" in named.results()
    with pytest.raises(ArtefactError, match="layers='last', not 'all'"):
        run(recipe, "importance", copied, basis_run=str(other.path), overwrite="true")


@pytest.mark.parametrize(
    ("phase", "more", "said"),
    [
        ("importance", {"layers": "last"}, "layers='all', not 'last'"),
        ("train", {"basis.samples": "3", "smoke": "false"}, "smoke=True, not False"),
        ("train", {"importance.ratios": "[0.05,0.5]"}, r"importance.ratios=\[0.05\], not \[0.05, 0.5\]"),
        ("importance", {"basis_run": "nowhere"}, "nowhere holds no finished phase 'basis'"),
        ("basis", {"seed": "4"}, "seed=0, not 4"),
    ],
)
def test_a_phase_that_does_not_fit_is_refused(finished: Path, recipe: ModuleType, phase, more, said) -> None:
    before = sorted(finished.rglob("*"))
    with pytest.raises(ArtefactError, match=said):
        run(recipe, phase, finished, **more)
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize("phase", ["basis", "importance", "train"])
def test_without_the_phase_before_there_is_a_way_out(tmp_path: Path, recipe: ModuleType, phase: str) -> None:
    with pytest.raises(ArtefactError, match=r"there is no finished phase .* run `warp.py"):
        run(recipe, phase, tmp_path)


@pytest.mark.parametrize("phase", ["importance", "train"])
def test_a_model_that_changed_since_is_noticed(copied: Path, recipe: ModuleType, phase: str) -> None:
    path = phase_of(copied, "behaviour") / "models/start"
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.001)
    model.save_pretrained(path)
    shutil.rmtree(phase_of(copied, phase))
    with pytest.raises(ArtefactError, match="was made from other weights"):
        run(recipe, phase, copied)


def test_an_interrupted_phase_goes_on(copied: Path, recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files appear whole; what is there is not made again, and gives the same as an undisturbed phase."""
    folder = phase_of(copied, "basis")
    whole = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for name in ("results.json", "output.safetensors"):
        (folder / name).unlink()
    made = (folder / "input.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(Basis, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe, "basis", copied)
    with pytest.raises(ArtefactError, match="no finished phase 'basis'"):
        run(recipe, "importance", copied)
    run(recipe, "basis", copied)
    assert (folder / "input.safetensors").stat().st_mtime_ns == made
    assert (
        Basis.load(folder / "output.safetensors").digest
        == Basis.load(_bytes(copied, whole["output.safetensors"])).digest
    )


def _bytes(where: Path, content: bytes) -> Path:
    path = where / "whole.safetensors"
    path.write_bytes(content)
    return path


def write(path: Path, count: int) -> Path:
    rows = [{"prompt": f"What is {k} and {k}?", "response": f"It is\n#### {2 * k}"} for k in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_any_model_and_data_set_in_bf16(finished: Path, tmp_path: Path, recipe: ModuleType) -> None:
    """With coordinates that both tasks need set free, and phase 0 left out."""
    tokenizer = AutoTokenizer.from_pretrained(phase_of(finished, "behaviour") / "models/start")
    given = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **TINY["llama"]))
    for part in (given, tokenizer):
        part.save_pretrained(tmp_path / "model")
    more = {"model": str(tmp_path / "model"), "dtype": "bfloat16", "read": "number", "validation": "0.3"}
    more |= {"protected.source": str(write(tmp_path / "refusals.jsonl", 40)), "task.source": "gsm8k_100"}
    more |= {"context": "500", "template": "{prompt}", "projections": "[attn_q,ffn_down]", "layers": "last"}
    more |= {"importance.task": "true", "variants": "[warp,warp_minus]", "train.learning_rate": "1e-2"}
    folder = run(recipe, "all", tmp_path / "runs", **more)
    results = folder.results()
    assert set(results) == {"start", "warp 5%", "warp_minus 5%"} and set(results["start"]["loss"]) == {
        "protected",
        "task",
    }
    assert results["warp_minus 5%"]["kept"] < results["warp 5%"]["kept"] == pytest.approx(0.05, rel=0.01)
    assert set(Basis.load(phase_of(tmp_path / "runs", "basis") / "input.safetensors").sites) == {
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    }
    assert not list((tmp_path / "runs").glob("behaviour-*"))
    assert AutoModelForCausalLM.from_pretrained(folder / "models/warp_5", dtype="auto").dtype == torch.bfloat16


def test_large_vocabularies_are_explained(recipe: ModuleType) -> None:
    """The parameters without a basis hold an embedding whose rows take more digits than Python prints of one number."""
    config = AutoConfig.for_model("llama", vocab_size=20_000, **TINY["llama"])
    model = AutoModelForCausalLM.from_config(config)
    basis = gs.estimators.activation_basis(model, [{"input_ids": torch.arange(8)[None]}], "down_proj")
    masks = {name: torch.ones(basis.rotated_shape(name), dtype=torch.bool) for name in basis}
    shown = gs.methods.warp(basis, masks, others="freeze").explain(model)
    assert basis.digest in shown and len(shown) < 2000
    assert basis.rest == gs.anatomy.Region.whole(basis.space) - basis.region


@given(st.integers(1, 200))
def test_thirds_are_all_layers_once(count: int) -> None:
    words = ("early", "middle", "late") if count > 2 else ("early",) if count == 1 else ("early", "middle")
    assert [n for word in words for n in layer_numbers(word, count)] == list(layer_numbers("all", count))
    for word in {"early", "middle", "late"} - set(words):
        with pytest.raises(PlanError, match="names no blocks"):
            layer_numbers(word, count)
    assert list(layer_numbers("last", count)) == [count - 1] == list(layer_numbers(str(count - 1), count))


@given(st.integers(1, 40), st.integers(0, 50), st.integers(0, 50))
def test_ranges_hold_both_ends_or_are_refused(count: int, first: int, last: int) -> None:
    if first <= last < count:
        assert list(layer_numbers(f"{first}-{last}", count)) == [n for n in range(count) if first <= n <= last]
    else:
        with pytest.raises(PlanError, match=f"which has {count}"):
            layer_numbers(f"{first}-{last}", count)


def test_thirds_are_the_originals() -> None:
    found = {word: layer_numbers(word, 32) for word in ("early", "middle", "late", "last")}
    assert found == {"early": range(11), "middle": range(11, 22), "late": range(22, 32), "last": range(31, 32)}


TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
    "gpt_neo": {**SHAPE, "num_layers": 3, "attention_types": [[["global"], 3]]},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    },
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
}


FUSED = ["attn_q", "attn_k", "attn_v", "ffn_gate"]
LACKING: dict[str, list[str]] = {"llama": [], "gpt2": FUSED, "gpt_neox": FUSED}


@pytest.mark.parametrize("kind", TINY)
def test_projections_are_disjoint_and_found_by_shape(kind: str) -> None:
    """Whatever a model calls them: up widens (or holds the width of neurons), down narrows, and no weight is two."""
    config = AutoConfig.for_model(kind, vocab_size=50, **TINY[kind])
    model = AutoModelForCausalLM.from_config(config)
    every, found = set(weights_of(model, "all", ["all-linear"])), {}
    lacking = set(LACKING.get(kind, ["ffn_gate"]))
    for projection in set(PROJECTIONS) - lacking:
        found[projection] = set(weights_of(model, "all", [projection]))
    for projection in lacking:
        with pytest.raises(SelectionError, match="its linear layers are"):
            weights_of(model, "all", [projection])
    for one, other in itertools.combinations(found, 2):
        assert not found[one] & found[other]
    left = every - set().union(*found.values())
    assert bool(left) == ("attn_q" in lacking)
    for name in found["ffn_down"]:
        up = next(n for n in found["ffn_up"] if n.split("mlp")[0].split("fc")[0] == name.split("mlp")[0].split("fc")[0])
        assert model.get_parameter(up).shape == model.get_parameter(name).shape[::-1]
    last = set(weights_of(model, "last", list(found)))
    assert last == {name for group in found.values() for name in group if ".2." in name}


@pytest.mark.parametrize(
    ("phase", "more", "error", "said"),
    [
        ("nonsense", {}, PlanError, "give a phase first"),
        ("train", {"variants": "[warp,nonsense]"}, PlanError, "not nonsense"),
        ("train", {"variants": "[mixed,warp_minus]"}, ArtefactError, "--importance.task true"),
        ("behaviour", {"model": "given"}, PlanError, "phase 0 is left out"),
        ("behaviour", {"glosses.refused": "[weather]"}, DataError, "no topic weather"),
        ("behaviour", {"glosses.answered": "[plant]"}, PlanError, "plant is named twice"),
        ("behaviour", {"glosses.refused": "[]"}, PlanError, "nothing to protect"),
        ("behaviour", {"task.source": "gsm8k_100"}, PlanError, "need a model"),
        ("basis", {"model": "START", "context": "500"}, PlanError, "do not fit GPTNeoForCausalLM"),
        ("basis", {"layers": "7-9"}, PlanError, "which has 2: 0-1"),
        ("basis", {"layers": "upper"}, PlanError, "not 'upper'"),
        ("basis", {"projections": "[attn_q,ffn_gate]"}, SelectionError, "no 'ffn_gate'; its linear layers are"),
        ("basis", {"model": "nowhere/at-all"}, ArtefactError, "nowhere/at-all cannot be loaded"),
        ("basis", {"basis.top_k": "999"}, GradsurgeryError, "999"),
    ],
)
def test_bad_input_is_one_sentence(copied: Path, recipe: ModuleType, phase, more, error, said) -> None:
    start, before = str(phase_of(copied, "behaviour") / "models/start"), sorted(copied.iterdir())
    with pytest.raises(error, match=said):
        run(recipe, phase, copied, **{name: value.replace("START", start) for name, value in more.items()})
    assert "top_k" in str(more) or sorted(copied.iterdir()) == before


def test_errors_reach_the_command_line_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit, match=r"PlanError: give a phase first"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_parse(recipe: ModuleType, path: Path) -> None:
    phase, config = recipe.parse(["all", "--config", str(path)])
    given = yaml.safe_load(path.read_text())
    assert phase == "all" and config.train.learning_rate == given["train"]["learning_rate"]
    assert set(config.variants) <= set(VARIANTS) and set(config.projections) <= set(PROJECTIONS)
    assert len(expanded(config)) >= len(config.variants) and config.model == given.get("model")


def test_llama_is_configured_as_the_original(recipe: ModuleType) -> None:
    _, config = recipe.parse(["all", "--config", str(RECIPES / "configs/warp/llama3_8b_gsm8k.yaml")])
    assert (config.basis.samples, config.basis.rows, config.importance.ratios) == (100, 4, [0.1])
    assert (config.layers, config.projections, config.dtype) == ("all", ["ffn_down"], "bfloat16")
    assert (config.task.limit, config.train.epochs, config.rows, config.train.learning_rate) == (1000, 3, 2, 5e-5)
    assert config.protected.where == {"ChatGPT_harmful": 0} and config.read == "number"


def test_the_default_is_the_embedded_run(recipe: ModuleType) -> None:
    _, config = recipe.parse(["all"])
    assert config == recipe.Config() and config.importance.ratios == [0.01, 0.05, 0.1, 0.2]
    assert {"full", "mask", "warp", "gpm"} <= set(config.variants)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    """Killed once in every phase, wherever it is, by the clock; and once between two steps of a training."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = {"variants": "[warp,mixed]"}

    def command(where: Path) -> list[str]:
        return [sys.executable, str(SCRIPT), "all", *words(where, **options)]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole), env=environment, check=True, capture_output=True, timeout=500)
    for pattern in ("behaviour-*/checkpoints/*/checkpoint-*/trainer_state.json", "basis-*/input.safetensors",
                    "importance-*/rotated-0.05.safetensors",
                    "train-*/checkpoints/mixed/checkpoint-*/trainer_state.json"):  # fmt: skip
        with subprocess.Popen(
            command(cut), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as going:
            deadline = time.time() + 300
            while not list(cut.glob(pattern)):
                assert going.poll() is None and time.time() < deadline
                time.sleep(0.005)
            going.send_signal(signal.SIGKILL)
    subprocess.run(command(cut), env=environment, check=True, capture_output=True, timeout=500)
    once, again = (json.loads((phase_of(where, "train") / "results.json").read_text()) for where in (whole, cut))
    for name in ("start", "warp 5%", "mixed"):
        for what in ("refusals", "loss", "exact_match"):
            assert once[name][what] == again[name][what]
