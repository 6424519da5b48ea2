"""The command line, on local configs; no network, no weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.cli import main
from tests.zoo.builder import build


def config_of(name: str) -> Any:
    return build(name).config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config_of("llama").save_pretrained(folder)
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err and shown.err.count("\n") == 1 and shown.err.startswith("gradsurgery: ")
    return shown.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"{gs.__version__}\n"


def test_inspect_a_folder_and_a_file(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama)]) == 0
    first = capsys.readouterr().out
    assert main(["inspect", str(llama / "config.json")]) == 0
    assert capsys.readouterr().out == first
    assert first.splitlines()[0].startswith("LlamaForCausalLM: 50,778 parameters")
    rows = {line.split()[0]: line.split() for line in first.splitlines()[2:5]}
    assert (
        rows["heads"][3:5] == ["6", "18"]
        and rows["kv_groups"][3:5] == ["3", "9"]
        and rows["neurons"][3:5] == ["52", "156"]
    )


def test_save_and_select(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "anatomy.json", "heads[:, -2:] | neurons[0, [1, 5, 6]]"
    assert main(["inspect", str(llama), "--save", str(path), "--select", text, "--groups"]) == 0
    out = capsys.readouterr().out
    model = build("llama")
    anatomy = gs.Anatomy.load(path, model)
    assert anatomy == gs.dissect(model)
    region = anatomy.select(text)
    assert f"9 units, {region.numel():,} entries, {100 * region.fraction:.3f}% of the model" in out
    for name, entries in region.entries.items():
        assert f"{name} " in out and f"{entries.numel():,d}" in out
    assert "[{1:2, 5:7}, :]" in out and "[40:60, :]" in out
    assert f"{len(anatomy.groups)} groups" in out
    assert out.count("model.layers.2.mlp ") == 1


def test_no_weights_are_allocated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config of 500 billion parameters."""
    config = config_of("llama").to_dict() | {
        "hidden_size": 2**14,
        "intermediate_size": 2**16,
        "num_hidden_layers": 100,
    }
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "65536" in out and "100 (0-99)" in out


@pytest.mark.parametrize(
    ("name", "auto_class", "wanted"), [("bert", None, "BertForMaskedLM"), ("bert", "AutoModel", "BertModel")]
)
def test_auto_class(
    name: str, auto_class: str | None, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(name)
    config.architectures = [type(build(name)).__name__]
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), *(["--auto-class", auto_class] if auto_class else [])]) == 0
    assert capsys.readouterr().out.startswith(f"{wanted}: ")


def test_a_bare_model_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "gpt2", "--select", "neurons[:, -64:]"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("GPT2LMHeadModel: 124,439,808 parameters") and "3072" in out


def test_errors_are_one_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "config.json" in fails(capsys, "inspect", tmp_path)
    assert "./my-model" in fails(capsys, "inspect", "someone/some-model-that-is-not-cached")
    assert "AutoNothing" in fails(capsys, "inspect", llama, "--auto-class", "AutoNothing")
    assert "AutoModelForImageClassification" in fails(
        capsys, "inspect", llama, "--auto-class", "AutoModelForImageClassification"
    )
    assert "have heads 0-5" in fails(capsys, "inspect", llama, "--select", "heads[:, 12]")
    assert "not part of a selection" in fails(capsys, "inspect", llama, "--select", "legs[:, 1]")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden')
    assert "config" in fails(capsys, "inspect", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    assert "no_such_type" in fails(capsys, "inspect", tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "file" in fails(capsys, "inspect", llama, "--save", blocked / "anatomy.json")


def test_code_of_others_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    fails(capsys, "inspect", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_wrong_arguments_exit_with_2() -> None:
    for arguments in ([], ["inspect"], ["dissect", "llama"], ["inspect", "llama", "--nothing"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_as_a_program(llama: Path) -> None:
    command = [sys.executable, "-m", "gradsurgery.cli", "inspect", str(llama), "--select", "heads[:, 12]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout.startswith("LlamaForCausalLM")
    assert done.stderr.strip().splitlines()[-1].startswith("gradsurgery: heads[:, 12] selects nothing")
    assert "Traceback" not in done.stderr


def test_defaults_of_torch_are_untouched(llama: Path) -> None:
    main(["inspect", str(llama)])
    assert torch.empty(1).device.type == "cpu"
