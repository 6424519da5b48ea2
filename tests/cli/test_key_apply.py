"""``gradsurgery key apply``: checkpoints in C2, and back."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gradsurgery as gs
from gradsurgery.cli import main
from gradsurgery.cli.key import apply as module
from gradsurgery.cli.key import reload
from tests.cli.test_cli import fails
from tests.zoo.builder import build

IDS = torch.arange(3, 17).view(2, 7)


def checkpoint(folder: Path, kind: str, dtype: torch.dtype = torch.float32, shard: str = "40KB") -> Any:
    model: Any = build(kind).eval().to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "plain.jinja").write_text("hello")
    return loaded(folder, dtype)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if model.config.model_type == "mixtral":
        model.set_experts_implementation("eager")  # grouped products want widths of 16 bytes
    return model


def key_for(model: Any, path: Path, **options: Any) -> gs.PermutationKey:
    options = {"fraction": 0.4, "attention_ratio": 0.4, "seed": 0, **options}
    key: gs.PermutationKey = gs.PermutationKey.generate(gs.dissect(model), **options)
    key.save(path)
    return key


def replace(file: Path, content: dict[str, torch.Tensor] | bytes) -> None:
    """As a new file: older releases keep the weights of a loaded model mapped to the old one."""
    file.unlink()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file, metadata={"format": "pt"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


CASES = [("llama", torch.float32), ("gpt2", torch.bfloat16), ("gpt_neo", torch.float16), ("phi3", torch.float32)]


@pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")
@pytest.mark.parametrize(("kind", "dtype"), [*CASES, ("mixtral", torch.bfloat16)])
def test_the_output_is_c2_and_its_output_c1(
    kind: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    c1, c2, again, path = (tmp_path / name for name in ("c1", "c2", "again", "key.json"))
    model = checkpoint(c1, kind, dtype)
    key = key_for(model, path)
    if kind != "mixtral":  # transformers stores its experts one by one and fuses them
        monkeypatch.setattr(reload, "exchange_loaded", None)
        monkeypatch.setattr(module, "exchange_loaded", None)
    assert main(["key", "apply", str(path), str(c1), str(c2)]) == 0
    assert f"{c2} is C2 (key {key.fingerprint})" in capsys.readouterr().out
    keyed = loaded(c2, dtype)
    with key.applied(model):
        assert torch.equal(logits(keyed), logits(model))
    assert not torch.equal(logits(keyed), logits(model))
    public = ~key.region(gs.dissect(model))
    for name, parameter in keyed.named_parameters():
        if name in public.entries:
            mask = public.of(name).mask()
            assert torch.equal(parameter[mask], model.get_parameter(name)[mask])
    mark = json.loads((c2 / "gradsurgery.json").read_text())
    assert (mark["configuration"], mark["keys"]) == ("C2", [key.fingerprint])
    assert mark["model"] == gs.dissect(model).fingerprint
    assert (c2 / "tokenizer.json").exists() and (c2 / "chat_templates" / "plain.jinja").read_text() == "hello"
    assert (c2 / "config.json").read_bytes() == (c1 / "config.json").read_bytes()
    assert stat.S_IMODE(c2.stat().st_mode) == 0o700  # as secret as the key
    assert main(["key", "apply", str(path), str(c2), str(again)]) == 0
    assert f"{again} is C1." in capsys.readouterr().out
    assert not (again / "gradsurgery.json").exists() and stat.S_IMODE(again.stat().st_mode) != 0o700
    before, after = tensors(c1), tensors(again)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if kind != "mixtral":
        for file in c1.rglob("*"):
            assert file.is_dir() or file.read_bytes() == (again / file.relative_to(c1)).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "c1", "c2", "key.json"]


def test_shards_stay_what_they_are(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "c1", "llama")
    key_for(model, tmp_path / "key.json")
    assert main(["key", "apply", str(tmp_path / "key.json"), str(tmp_path / "c1"), str(tmp_path / "c2")]) == 0
    files = sorted(p.name for p in (tmp_path / "c1").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(p.name for p in (tmp_path / "c2").glob("*.safetensors"))


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    """As gpt2's own checkpoint: tensors of the base model, one file."""
    model = checkpoint(tmp_path / "c1", "gpt2", shard="1GB")
    file = tmp_path / "c1" / "model.safetensors"
    replace(file, {n.removeprefix("transformer."): v.clone() for n, v in load_file(file).items()})
    key = key_for(model, tmp_path / "key.json")
    assert main(["key", "apply", str(tmp_path / "key.json"), str(tmp_path / "c1"), str(tmp_path / "c2")]) == 0
    assert load_file(tmp_path / "c2" / "model.safetensors").keys() == load_file(file).keys()
    keyed = loaded(tmp_path / "c2")
    with key.applied(model):
        assert torch.equal(logits(keyed), logits(model))


def test_pickled_weights_are_read_and_written_as_safetensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint(tmp_path / "c1", "llama", shard="1GB")
    (tmp_path / "c1" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "c1" / "pytorch_model.bin")
    key = key_for(model, tmp_path / "key.json")
    assert main(["key", "apply", str(tmp_path / "key.json"), str(tmp_path / "c1"), str(tmp_path / "c2")]) == 0
    assert "left out: pytorch_model.bin" in capsys.readouterr().out
    keyed = loaded(tmp_path / "c2")
    with key.applied(model):
        assert torch.equal(logits(keyed), logits(model))


def test_the_state_of_a_training_run_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moments in C1 beside weights in C2 would scramble a run that resumes."""
    model = checkpoint(tmp_path / "c1", "llama")
    state = ["optimizer.pt", "rng_state.pth", "surgery.json", "surgery.safetensors", "trainer_state.json"]
    for name in [*state, "README.md"]:
        (tmp_path / "c1" / name).write_bytes(b"x")
    key_for(model, tmp_path / "key.json")
    assert main(["key", "apply", str(tmp_path / "key.json"), str(tmp_path / "c1"), str(tmp_path / "c2")]) == 0
    assert f"left out: {', '.join(state)}" in capsys.readouterr().out
    assert not any((tmp_path / "c2" / name).exists() for name in state) and (tmp_path / "c2" / "README.md").exists()


def test_keys_come_off_in_the_reverse_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two keys that share slots: their order matters, and the checkpoint knows it."""
    model = checkpoint(tmp_path / "c1", "llama")
    one = key_for(model, tmp_path / "one.json", seed=1)
    other = key_for(model, tmp_path / "other.json", seed=2)

    def apply(key: str, source: str, output: str) -> int:
        return main(["key", "apply", *(str(tmp_path / name) for name in (f"{key}.json", source, output))])

    assert apply("one", "c1", "c2") == apply("other", "c2", "c3") == 0
    assert module.applied_keys(tmp_path / "c3") == [one.fingerprint, other.fingerprint]
    assert stat.S_IMODE((tmp_path / "c3").stat().st_mode) == 0o700
    capsys.readouterr()
    refused = fails(capsys, "key", "apply", tmp_path / "one.json", tmp_path / "c3", tmp_path / "no")
    assert f"take {other.fingerprint} off first" in refused
    assert apply("other", "c3", "c2-again") == apply("one", "c2-again", "c1-again") == 0
    before, after = tensors(tmp_path / "c1"), tensors(tmp_path / "c1-again")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_refused_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "c1", "llama")
    key_for(model, tmp_path / "key.json")
    names = {p.name for p in tmp_path.iterdir()}
    base = ["key", "apply", tmp_path / "key.json", tmp_path / "c1"]

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        text = fails(capsys, *arguments)
        assert {p.name for p in tmp_path.iterdir()} == names
        return text

    assert "exists" in refused(*base, tmp_path / "c1")
    assert "no config.json" in refused("key", "apply", tmp_path / "key.json", tmp_path, tmp_path / "c2")
    shards = sorted((tmp_path / "c1").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    replace(shards[1], whole[:-100])
    assert f"{shards[1]} is truncated" in refused(*base, tmp_path / "c2")
    replace(shards[1], whole[:4])
    assert f"{shards[1]} is truncated" in refused(*base, tmp_path / "c2")
    shards[1].unlink()
    assert f"{shards[1]} is missing" in refused(*base, tmp_path / "c2")
    shards[1].write_bytes(whole)

    config = json.loads((tmp_path / "c1" / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "c1" / "config.json").write_text(json.dumps(quantised))
    assert "is quantised" in refused(*base, tmp_path / "c2")
    (tmp_path / "c1" / "config.json").write_text(json.dumps(config))

    (tmp_path / "c1" / "gradsurgery.json").write_text('{"format": 99}')
    assert "pip install --upgrade" in refused(*base, tmp_path / "c2")
    (tmp_path / "c1" / "gradsurgery.json").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "carry_over", full)
    assert "No space left" in refused(*base, tmp_path / "c2")


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint(tmp_path / "c1", "llama", shard="1GB")
    file = tmp_path / "c1" / "model.safetensors"
    replace(file, {name: value for name, value in load_file(file).items() if "layers.1.mlp" not in name})
    key_for(model, tmp_path / "key.json")
    capsys.readouterr()
    text = fails(capsys, "key", "apply", tmp_path / "key.json", tmp_path / "c1", tmp_path / "c2")
    assert "lacks 3 weights of LlamaForCausalLM, e.g. model.layers.1.mlp.down_proj.weight" in text


def test_a_dtype_that_is_lost_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint(tmp_path / "c1", "mixtral", torch.bfloat16, shard="1GB")
    file = tmp_path / "c1" / "model.safetensors"
    replace(file, {n: v.float() if n == "model.norm.weight" else v for n, v in load_file(file).items()})
    key_for(model, tmp_path / "key.json")
    assert main(["key", "apply", str(tmp_path / "key.json"), str(tmp_path / "c1"), str(tmp_path / "c2")]) == 0
    assert "1 tensors in F32" in capsys.readouterr().err
