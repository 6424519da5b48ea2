"""The tiered recipes at smoke size: what they leave behind and where, what they refuse, that they resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradsurgery as gs

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPE = {
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 4,
    "intermediate_size": 64,
    "attention_types": [[["global"], 3]],
}
TRAIN = {
    "train.steps": 6,
    "train.eval_every": 3,
    "train.eval_rows": 4,
    "train.save_every": 2,
    "train.log_every": 1,
}
PRETRAIN = {
    **TRAIN,
    "text.limit": 250,
    "text.test_rows": 8,
    "model.context": 32,
    "model.options": json.dumps(SHAPE),
    "draw.fraction": 0.4,
    "draw.attention_ratio": 0.25,
    "rows": 4,
}
BASELINE = {k: v for k, v in PRETRAIN.items() if not k.startswith("draw")}
FINETUNE = {
    **{f"pretrain.{k}": v for k, v in PRETRAIN.items()},
    **TRAIN,
    "limit": 250,
    "test_rows": 8,
    "context": 32,
    "rows": json.dumps({"private": 4, "public": 2}),
    "guesses.count": 2,
    "guesses.draws": 1,
    "decoys": 3,
}


def command(script: str, options: dict[str, object]) -> list[str]:
    return [sys.executable, str(RECIPES / script), *(f"--{k}={v}" for k, v in options.items())]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def run(where: Path, script: str, options: dict[str, object], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    words = command(script, options)
    if ranks > 1:
        words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *words[1:]]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=500, cwd=where)


def the_only(where: Path, pattern: str) -> Path:
    (found,) = where.glob(pattern)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    where = tmp_path_factory.mktemp("tiers")
    done = run(where, "private_finetune.py", {**FINETUNE, "variants": "[keyed,no_kl,lora,extract_random_key]"})
    assert done.returncode == 0, done.stderr
    return where, done.stdout + done.stderr


def pretrained(where: Path) -> tuple[Path, Path]:
    """The pretraining run of a finished finetune, and its key."""
    return the_only(where, "runs/tiered_pretrain/*"), the_only(where, "keys/*.json")


def test_pretraining_and_finetuning_leave_everything(finished: tuple[Path, str]) -> None:
    where, printed = finished
    folders = [pretrained(where)[0], the_only(where, "runs/private_finetune/*")]
    for folder in folders:
        names = {p.name for p in folder.iterdir()}
        assert names >= {"config.yaml", "metrics.jsonl", "results.json", "report.html", "models", "plots"}
        assert len(list((folder / "plots").iterdir())) >= 2 and not list(folder.rglob("*.part"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(line["tokens_per_second"] > 0 and line["flops"] > 0 for line in lines if "loss" in line)
        assert {"eval/C1/en", "eval/C2/es"} <= {key for line in lines for key in line}
        assert "http://" not in (folder / "report.html").read_text()
    for line in ("C1, before", "C2, keyed", "random key, keyed", "50% of the key, no_kl", "adapters, lora"):
        assert line in printed


def test_public_entries_stay_bit_for_bit_and_keyed_ones_move(finished: tuple[Path, str]) -> None:
    where, _ = finished
    run_folder, key_file = pretrained(where)
    tuned = the_only(where, "runs/private_finetune/*")
    before = AutoModelForCausalLM.from_pretrained(run_folder / "models/tiered")
    key, anatomy = gs.PermutationKey.load(key_file), gs.dissect(before)
    keyed = key.region(anatomy)
    for variant in ("keyed", "no_kl"):
        after = dict(AutoModelForCausalLM.from_pretrained(tuned / "models" / variant).named_parameters())
        for name, parameter in before.named_parameters():
            moved = parameter != after[name]
            mask = keyed.entries[name].mask() if name in keyed.entries else torch.zeros_like(moved)
            assert not (moved & ~mask).any()
            assert bool(moved.any()) == bool(mask.any())
        assert json.loads((tuned / "results.json").read_text())[variant]["public entries changed"] == 0


def test_adapters_have_no_more_entries_than_the_key_moves(finished: tuple[Path, str]) -> None:
    results = json.loads((the_only(finished[0], "runs/private_finetune/*") / "results.json").read_text())
    assert 0.5 * results["keyed"]["entries"] < results["lora"]["entries"] <= results["keyed"]["entries"]


def test_keys_lie_outside_of_runs_owner_only_and_ignored(finished: tuple[Path, str]) -> None:
    where, _ = finished
    run_folder, key_file = pretrained(where)
    assert key_file.name == f"{run_folder.name}.json"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600 and stat.S_IMODE(key_file.parent.stat().st_mode) == 0o700
    subprocess.run(["git", "init", "-q"], cwd=where, check=True)
    listed = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=where, capture_output=True, text=True)
    assert "runs/" in listed.stdout and "keys" not in listed.stdout
    shutil.rmtree(where / ".git")


def test_no_swap_is_in_a_run_folder_or_on_the_screen(finished: tuple[Path, str]) -> None:
    where, printed = finished
    key = gs.PermutationKey.load(pretrained(where)[1])
    texts = {"screen": printed}
    for path in (where / "runs").rglob("*"):
        if path.is_file():
            texts[str(path)] = path.read_bytes().decode("latin-1")
    (a, i), (b, j) = key.mlp_cols[0]
    swap = re.compile(rf"[\[(]{a},\s*{i}[\])],\s*[\[(]{b},\s*{j}[\])]")
    for name, text in texts.items():
        assert not swap.search(text) and not re.search(r"(attn_heads|mlp_cols)\W{1,4}\[", text), name
        assert "key_seed" not in text, name
    assert key.fingerprint in texts[str(the_only(where, "runs/private_finetune/*") / "config.yaml")]


def test_checkpoints_are_stock_ones_in_c1(finished: tuple[Path, str]) -> None:
    where, _ = finished
    for path in where.glob("runs/*/*/models/*"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        ids = torch.tensor([tokenizer("In the beginning")["input_ids"]])
        assert torch.isfinite(model(input_ids=ids).logits).all()


def test_the_same_command_resumes_and_finds_its_key(finished: tuple[Path, str]) -> None:
    where, _ = finished
    paths = [*where.glob("runs/*/*/results.json"), *where.glob("keys/*.json")]
    before = {path: path.read_bytes() for path in paths}
    again = run(where, "private_finetune.py", {**FINETUNE, "variants": "[keyed,no_kl,lora,extract_random_key]"})
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in paths} == before


def test_a_run_whose_key_is_gone_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    where, _ = finished
    folder = pretrained(where)[0]
    shutil.copytree(folder, tmp_path / "runs/tiered_pretrain" / folder.name)
    done = run(tmp_path, "tiered_pretrain.py", PRETRAIN)
    assert done.returncode == 1 and "its key" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "keys").exists()


def test_inference_shows_the_tiers_side_by_side(finished: tuple[Path, str]) -> None:
    where, _ = finished
    done = run(where, "tiered_inference.py", {"prompt": "In the", "max_new_tokens": 5, "out": "said.json"})
    assert done.returncode == 0 and "C1" in done.stdout and "C2" in done.stdout, done.stderr
    folder, key = pretrained(where)
    options = {
        "model": folder / "models/tiered",
        "key": key,
        "prompt": "In the",
        "max_new_tokens": 5,
        "out": "two.json",
    }
    sampled = {"do_sample": "true", "temperature": 1.1, "top_p": 0.9, "top_k": 50, "num_return_sequences": 2, "seed": 3}
    done = run(where, "tiered_inference.py", {**options, **sampled})
    assert done.returncode == 0, done.stderr
    (said,) = json.loads((where / "two.json").read_text())
    assert len(said["C1"]) == len(said["C2"]) == 2
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(options["model"]),
        AutoTokenizer.from_pretrained(folder / "models/tiered"),
    )
    torch.manual_seed(3)
    ids = tokenizer("In the", return_tensors="pt", return_token_type_ids=False)
    stock = model.generate(
        **ids, do_sample=True, temperature=1.1, top_p=0.9, top_k=50, num_return_sequences=2, max_new_tokens=5,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    assert said["C1"] == tokenizer.batch_decode(stock[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_baseline_trains_and_each_script_goes_on_from_the_others_checkpoint(tmp_path: Path) -> None:
    halfway = {**PRETRAIN, "train.steps": 6, "name": "run", "key_seed": 1}
    first = kill_at_checkpoint(tmp_path, "tiered_pretrain.py", halfway, "runs/tiered_pretrain/run/checkpoints/tiered")
    options = {**BASELINE, "resume_from": first, "train.log_every": 1, "name": "run"}
    done = run(tmp_path, "baseline_pretrain.py", options)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/baseline_pretrain/run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert min(steps) == int(first.name.rpartition("-")[2]) + 1 and max(steps) == 6


def kill_at_checkpoint(where: Path, script: str, options: dict[str, object], checkpoints: str) -> Path:
    """Start a recipe and kill it once it has a checkpoint, which is returned."""
    with subprocess.Popen(
        command(script, options), env=environment(), cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as going:
        deadline = time.time() + 200
        while not list((where / checkpoints).glob("checkpoint-*/trainer_state.json")):
            assert going.poll() is None and time.time() < deadline
            time.sleep(0.005)
        going.send_signal(signal.SIGKILL)
    whole = [path.parent for path in (where / checkpoints).glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]))


@pytest.mark.slow
def test_moments_in_c2_are_not_taken_by_a_script_that_steps_in_c1(tmp_path: Path) -> None:
    options = {**PRETRAIN, "method.step_in": "C2", "name": "run", "key_seed": 1}
    first = kill_at_checkpoint(tmp_path, "tiered_pretrain.py", options, "runs/tiered_pretrain/run/checkpoints/tiered")
    done = run(tmp_path, "baseline_pretrain.py", {**BASELINE, "resume_from": first})
    assert done.returncode == 1 and "KeyStateError" in done.stderr and "start_from" in done.stderr


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("private_finetune.py", {"model": "somewhere"}, "key"),
        ("private_finetune.py", {"key": "key.json"}, "model"),
        ("private_finetune.py", {"variants": "[lora,nonsense]"}, "nonsense"),
        ("tiered_pretrain.py", {"key_seed": 1, "key": "key.json"}, "both"),
        ("tiered_pretrain.py", {"key": "nowhere.json"}, "nowhere.json"),
        ("tiered_pretrain.py", {**PRETRAIN, "key_folder": "runs/tiered_pretrain/x", "name": "x"}, "outside"),
        ("tiered_pretrain.py", {"text.categories": "[fr]"}, "'fr'"),
        ("tiered_inference.py", {"prompt": "x"}, "no finished run"),
        ("tiered_inference.py", {"prompt": "x", "model": "nowhere"}, "both"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(tmp_path: Path, script: str, options: dict[str, object], said: str) -> None:
    done = run(tmp_path, script, options)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_several_keys_are_several_stages_and_tiers(tmp_path: Path) -> None:
    options = {**FINETUNE, "pretrain.draw.count": 2, "pretrain.draw.fraction": 0.3, "pretrain.draw.attention_ratio": 0}
    stages = {"private": "[es:tatoeba,es:bible]", "variants": "[keyed,lora]", "guesses.count": 1, "limit": 1300}
    done = run(tmp_path, "private_finetune.py", {**options, **stages})
    assert done.returncode == 0, done.stderr
    results = json.loads((the_only(tmp_path, "runs/private_finetune/*") / "results.json").read_text())
    assert set(results) == {"before", "keyed_stage1", "keyed_stage2", "lora_stage1", "lora_stage2"}
    assert {"C1", "C2", "C3"} < set(results["keyed_stage2"]["scores"])
    passes = [p["name"] for p in results["keyed_stage2"]["method"]["passes"]]
    assert passes == ["public", "anchor 1", "private", "decoy 1", "decoy 2", "decoy 3"]


def test_two_ranks_train_what_one_would(tmp_path: Path, finished: tuple[Path, str]) -> None:
    where, _ = finished
    shutil.copytree(where / "keys", tmp_path / "keys")
    done = run(tmp_path, "private_finetune.py", {**FINETUNE, "variants": "[keyed]"}, ranks=2)
    assert done.returncode == 0, done.stderr
    for pattern, name in (("runs/tiered_pretrain/*", "tiered"), ("runs/private_finetune/*", "keyed")):
        both, one = (json.loads((the_only(f, pattern) / "results.json").read_text()) for f in (tmp_path, where))
        for tier in ("C1", "C2"):
            for category, scores in one[name]["scores"][tier].items():
                assert both[name]["scores"][tier][category]["loss"] == pytest.approx(scores["loss"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tiered_pretrain", "private_finetune"])
@pytest.mark.parametrize("step_in", ["C1", "C2"])
def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, script: str, step_in: str) -> None:
    prefix = "pretrain." if script == "private_finetune" else ""
    options = {**(FINETUNE if prefix else PRETRAIN), f"{prefix}method.step_in": step_in, f"{prefix}key_seed": 5}
    options |= {"variants": "[keyed]"} if prefix else {}
    name, folder = ("keyed", "runs/private_finetune/run") if prefix else ("tiered", "runs/tiered_pretrain/run")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for where in (whole, cut):
        where.mkdir()
    assert run(whole, f"{script}.py", {**options, "name": "run"}).returncode == 0
    kill_at_checkpoint(cut, f"{script}.py", {**options, "name": "run"}, f"{folder}/checkpoints/{name}")
    done = run(cut, f"{script}.py", {**options, "name": "run"})
    assert done.returncode == 0, done.stderr
    resumed, once = (json.loads((where / folder / "results.json").read_text()) for where in (cut, whole))
    assert resumed[name]["scores"] == once[name]["scores"]
    lines = [json.loads(line) for line in (cut / folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_killed_run_resumes_on_another_number_of_ranks(tmp_path: Path, finished: tuple[Path, str]) -> None:
    where, _ = finished
    shutil.copytree(where / "keys", tmp_path / "keys")
    name = pretrained(where)[0].name
    kill_at_checkpoint(tmp_path, "tiered_pretrain.py", PRETRAIN, f"runs/tiered_pretrain/{name}/checkpoints/tiered")
    done = run(tmp_path, "tiered_pretrain.py", PRETRAIN, ranks=2)
    assert done.returncode == 0, done.stderr
    both, one = (
        json.loads((f / "runs/tiered_pretrain" / name / "results.json").read_text()) for f in (tmp_path, where)
    )
    for tier, scores in one["tiered"]["scores"].items():
        for category, found in scores.items():
            assert both["tiered"]["scores"][tier][category]["loss"] == pytest.approx(found["loss"], abs=2e-4)
