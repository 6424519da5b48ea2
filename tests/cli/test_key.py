"""``gradsurgery key new``, ``show``, ``validate`` and ``compare``."""

from __future__ import annotations

import getpass
import io
import json
import re
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.anatomy import Anatomy
from gradsurgery.cli import main
from gradsurgery.cli.key.dimensions import anatomy_of_dimensions
from tests.cli.test_cli import config_of, fails
from tests.zoo.builder import build

SWAP = re.compile(r"\[\s*\d+\s*,\s*\d+\s*\]|\(\d+, \d+\)")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config_of("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return gs.dissect(build("llama"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_new_writes_a_key_and_never_prints_it(
    llama: Path, anatomy: Anatomy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys" / "key.json"
    out = run(capsys, "key", "new", llama, "--output", path, "--fraction", 0.5, "--attention-ratio", 0.4)
    key = gs.PermutationKey.load(path)
    key.validate(anatomy)
    region = key.region(anatomy)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.fingerprint in out and anatomy.fingerprint in out
    swappable = (anatomy.kv_groups | anatomy.neurons).numel()
    assert f"{region.numel():,}  {100 * region.numel() / swappable:.2f}%" in out
    assert f"{100 * region.fraction:.2f}%" in out
    assert f"{key.entropy_bits(anatomy):,.1f} bits" in out and f"{key.entropy_bits(anatomy, True):,.1f} bits" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["attn_heads"][1] == str(len(key.attn_heads)) and rows["mlp_cols"][1] == str(len(key.mlp_cols))
    assert rows["all"][1] == str(len(key)) and rows["all"][2] == "0-2"
    assert not SWAP.search(out)
    assert f"{path} exists" in fails(capsys, "key", "new", llama, "--output", path)
    assert gs.PermutationKey.load(path) == key


def test_new_makes_what_generate_makes(
    llama: Path, anatomy: Anatomy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "fraction": 0.1,
        "of": "all",
        "attention_ratio": 0.2,
        "pairing": "any",
        "mlp": "up",
        "count": 2,
        "seed": 7,
    }
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    out = run(capsys, "key", "new", llama, "--output", tmp_path / "key.json", *flags)
    for k, key in enumerate(gs.PermutationKey.generate(anatomy, **options)):
        assert gs.PermutationKey.load(tmp_path / f"key-{k + 1}.json") == key
    assert "guesses the seed" in out and not (tmp_path / "key.json").exists()


def test_no_key_is_written_where_one_of_several_exists(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key-2.json").write_text("mine")
    assert "key-2.json exists" in fails(capsys, "key", "new", llama, "--output", tmp_path / "key.json", "--count", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["key-2.json"]


DIMENSIONS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"gated": True, "mlp_bias": False}, ["--gated", "--no-mlp-bias"]),
    ("llama_mha", {"gated": True, "mlp_bias": False, "attention_bias": True}, ["--gated", "--no-mlp-bias"]),
    ("gpt_neo", {}, []),
]


@pytest.mark.parametrize(("kind", "more", "flags"), DIMENSIONS)
def test_dimensions_alone(
    kind: str, more: dict[str, Any], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Entries, entropy and (from one seed) swaps are those of the model itself."""
    model: Any = build(kind)
    config, real = model.config, gs.dissect(model)
    heads, mlp = config.num_attention_heads, config.intermediate_size
    kv, width = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    total = sum(p.numel() for p in model.parameters())
    plain = gs.keys.Dimensions(3, heads, config.hidden_size, mlp, num_kv_heads=kv, head_dim=width, total=total, **more)
    made = anatomy_of_dimensions(plain)
    key = gs.PermutationKey.generate(plain, fraction=0.5, attention_ratio=0.4, seed=3)
    assert key.attn_heads and key.mlp_cols
    assert key.region(made).numel() == key.region(real).numel()
    assert made.space.numel() == real.space.numel()
    assert made.fingerprint != real.fingerprint and key.model is None
    for functional in (False, True):
        assert key.entropy_bits(made, functional) == pytest.approx(key.entropy_bits(real, functional))
    optional = [*flags, *(["--attention-bias"] if more.get("attention_bias") else [])]
    optional += ["--kv-heads", str(kv), "--head-dim", str(width)] if kv else []
    sizes = ["--layers", 3, "--heads", heads, "--hidden", config.hidden_size, "--mlp-dim", mlp, "--parameters", total]
    draw = ["--fraction", 0.5, "--attention-ratio", 0.4, "--seed", 3]
    out = run(capsys, "key", "new", "--output", tmp_path / "key.json", *sizes, *optional, *draw)
    assert gs.PermutationKey.load(tmp_path / "key.json") == key
    assert f"{key.region(real).numel():,}" in out and f"{100 * key.region(real).fraction:.2f}%" in out


def test_without_the_total_there_is_no_share_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "2", "--heads", "2", "--hidden", "8", "--mlp-dim", "32"]
    out = run(capsys, "key", "new", "--output", tmp_path / "key.json", *sizes)
    assert "of the model" not in out and "of swappable" in out and "no swap of heads fits" in out
    base = ["key", "new", "--output", tmp_path / "other.json"]
    assert (
        "--of all needs --parameters" in fails(capsys, *base, *sizes, "--of", "all")
        and not (tmp_path / "other.json").exists()
    )
    assert "is less than the" in fails(capsys, *base, *sizes, "--parameters", 5)
    assert "--heads, --mlp-dim missing" in fails(capsys, *base, "--layers", 2, "--hidden", 8)
    assert "not both: llama and --layers" in fails(capsys, *base, "llama", "--layers", 2)
    assert "--layers, --heads, --hidden, --mlp-dim missing" in fails(capsys, *base)


class TestPassphrase:
    def test_from_the_terminal(
        self, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(getpass, "getpass", lambda prompt: "correct horse")
        out = run(capsys, "key", "new", llama, "--output", tmp_path / "a.json", "--passphrase")
        assert "correct horse" not in out and "at most the passphrase's" in out
        file = tmp_path / "secret"
        file.write_text("correct horse\n")
        file.chmod(0o600)
        run(capsys, "key", "new", llama, "--output", tmp_path / "b.json", "--passphrase-file", file)
        monkeypatch.setattr(sys, "stdin", io.StringIO("correct horse\nmore"))
        run(capsys, "key", "new", llama, "--output", tmp_path / "c.json", "--passphrase-file", "-")
        keys = [gs.PermutationKey.load(tmp_path / f"{name}.json") for name in "abc"]
        assert keys[0] == keys[1] == keys[2]
        for name in "abc":
            assert "horse" not in (tmp_path / f"{name}.json").read_text()

    def test_what_is_refused(
        self, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = ["key", "new", llama, "--output", tmp_path / "key.json"]
        answers = iter(["one", "other"])
        monkeypatch.setattr(getpass, "getpass", lambda prompt: next(answers))
        assert "the two passphrases differ" in fails(capsys, *base, "--passphrase")
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
        assert "is empty" in fails(capsys, *base, "--passphrase-file", "-")
        assert "no/such/file" in fails(capsys, *base, "--passphrase-file", "no/such/file")
        (tmp_path / "two").write_text("one\ntwo\n")
        assert "several lines" in fails(capsys, *base, "--passphrase-file", tmp_path / "two")

        def no_terminal(prompt: str) -> str:
            import warnings

            warnings.warn("Can not control echo", getpass.GetPassWarning, stacklevel=2)
            return "typed in the open"

        monkeypatch.setattr(getpass, "getpass", no_terminal)
        assert "--passphrase-file" in fails(capsys, *base, "--passphrase")
        with pytest.raises(SystemExit):
            main([*map(str, base), "--passphrase", "--seed", "1"])
        assert not (tmp_path / "key.json").exists()

    def test_a_file_that_others_may_read_is_warned_of(
        self, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "secret"
        file.write_text("correct horse")
        file.chmod(0o644)
        assert main(["key", "new", str(llama), "--output", str(tmp_path / "k"), "--passphrase-file", str(file)]) == 0
        assert "gradsurgery: warning: " in (shown := capsys.readouterr().err) and "chmod 600" in shown


def saved(key: gs.PermutationKey, path: Path) -> Path:
    key.save(path)
    return path


def test_show_and_validate(llama: Path, anatomy: Anatomy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = gs.PermutationKey.generate(anatomy, fraction=0.5, attention_ratio=0.4, seed=0)
    path = saved(key, tmp_path / "key.json")
    short, full = run(capsys, "key", "show", path), run(capsys, "key", "show", path, llama)
    assert (
        short.splitlines()[0]
        == full.splitlines()[0]
        == (f"{path}: key {key.fingerprint}, made for the model {anatomy.fingerprint}")
    )
    assert "entropy" in full and "entropy" not in short and not SWAP.search(short + full)
    revealed = run(capsys, "key", "show", path, "--reveal")
    (line,) = [line for line in revealed.splitlines() if line.startswith("attn_heads: ")]
    assert json.loads(line.removeprefix("attn_heads: ")) == [
        list(map(list, s)) for s in sorted(map(sorted, key.attn_heads))
    ]  # type: ignore[type-var]
    assert run(capsys, "key", "validate", path, llama) == (
        f"{path}: key {key.fingerprint} fits LlamaForCausalLM ({anatomy.fingerprint})\n"
    )
    assert "for any model" in run(capsys, "key", "show", saved(key.for_any_model(), tmp_path / "free.json"))


def test_windows_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of("gpt_neo").save_pretrained(tmp_path / "neo")
    path = saved(gs.PermutationKey(attn_heads=[[[0, 0], [1, 1]]]), tmp_path / "key.json")
    for command in ("validate", "show"):
        assert main(["key", command, str(path), str(tmp_path / "neo")]) == 0
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "warning: 1 of 1 swaps of heads join layers with different" in err
    path.chmod(0o644)
    assert main(["key", "show", str(path)]) == 0
    assert "chmod 600" in capsys.readouterr().err


def test_what_validate_refuses(
    llama: Path, anatomy: Anatomy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(text: str) -> str:
        path = tmp_path / "key.json"
        path.write_text(text)
        path.chmod(0o600)
        return fails(capsys, "key", "validate", path, llama)

    assert "truncated" in refused('{"attn_heads": [[[0, 1]')
    assert "no permutation key" in refused("[1, 2]")
    assert "holds no swap" in refused('{"attn_heads": [], "mlp_cols": []}')
    assert "stands in mlp_cols[0] and mlp_cols[1]" in refused('{"mlp_cols": [[[0, 1], [1, 1]], [[0, 1], [2, 1]]]}')
    assert "whole numbers" in refused('{"mlp_cols": [[[0, 1.5], [1, 1]]]}')
    assert "a swap is" in refused('{"mlp_cols": [[0, 1]]}')
    assert "have neurons 0-51" in refused('{"mlp_cols": [[[0, 52], [1, 1]]]}')
    assert "have KV groups 0-2" in refused('{"attn_heads": [[[0, 3], [1, 1]]]}')
    assert "does not exist" in fails(capsys, "key", "validate", tmp_path / "none.json", llama)
    other = saved(gs.PermutationKey.generate(gs.dissect(build("qwen2")), seed=0), tmp_path / "other.json")
    assert "was made for a model with fingerprint" in fails(capsys, "key", "validate", other, llama)
    assert "./my-model" in fails(capsys, "key", "show", other, "someone/some-model-that-is-not-cached")


def test_compare(llama: Path, anatomy: Anatomy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = gs.PermutationKey(attn_heads=[[[0, 0], [1, 1]]], mlp_cols=[[[0, i], [1, i]] for i in range(4)])
    b = gs.PermutationKey(mlp_cols=[[[0, 0], [1, 0]], [[0, 1], [2, 1]], [[0, 40], [1, 41]]])
    paths = [saved(key, tmp_path / f"{k}.json") for k, key in enumerate((a, b, b.subset(1.0)))]
    out = run(capsys, "key", "compare", paths[0], paths[1], llama)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["head"] == ["head", "2", "0", "0", "1", "0", "0"]
    assert rows["neuron"] == ["neuron", "8", "6", "3", "4", "3", "1"]
    shared = (a.region(anatomy) & b.region(anatomy)).numel()
    assert "not disjoint" in out and f"both move {shared:,} of" in out
    assert f"{100 * shared / b.region(anatomy).numel():.2f}% of b's" in out
    assert "the keys are equal" in run(capsys, "key", "compare", paths[1], paths[2])
    one = gs.PermutationKey(mlp_up_cols=[[[0, 0], [1, 0]]])
    other = gs.PermutationKey(mlp_down_cols=[[[0, 0], [1, 0]]])
    halves = [saved(key, tmp_path / f"half-{k}.json") for k, key in enumerate((one, other))]
    assert "are disjoint" in run(capsys, "key", "compare", *halves)  # one moves rows, the other columns


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["key"], ["key", "forge"], ["key", "new", "llama"], ["key", "new", "llama", "--mlp", "sideways"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["key", "new", "--help"])
    assert "gradsurgery key new ./my-model --output key.json --count" in capsys.readouterr().out.replace(
        "keys/key.json", "key.json"
    )
    assert torch.empty(1).device.type == "cpu"
