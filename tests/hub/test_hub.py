"""To the hub and back: stock weights, a card that people and the hub read, a record that programs read, and no key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

import gradsurgery as gs
from gradsurgery.hub.publish import RECORD
from gradsurgery.surgery import Method
from tests.engines.methods import CASES
from tests.keys.tiers import double, key_of

pytestmark = pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")
ON_MODELS = [name for name in CASES if not name.startswith("quarantine")]


def keys_in(method: Method) -> list[Any]:
    return [t for p in method.passes for t in p.under if isinstance(t, gs.PermutationKey)]


@pytest.mark.parametrize("name", ON_MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model, method = CASES[name].start()
    results = {"loss": 1.23456, "kept": True, "a | b": "text"}
    out = gs.hub.save_pretrained(
        model, method, tmp_path / "out", name, results, base_model="someone/base", licence="mit", language=["en", "es"]
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    assert type(again) is type(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    record = gs.hub.load_record(out, again)
    assert record["method"] == name and record["gradsurgery"] == gs.__version__ and record["results"] == results
    assert record["describes"] == json.loads(json.dumps(method.describe()))
    assert record["keys"] == sorted({key.fingerprint for key in keys_in(method)})
    card = huggingface_hub.ModelCard((out / "README.md").read_text())
    about = card.data.to_dict()
    assert about["base_model"] == "someone/base" and about["license"] == "mit" and about["language"] == ["en", "es"]
    assert "gradsurgery" in about["tags"] and about["library_name"] == "transformers"
    assert all(key in card.text for key in record["keys"]) and name in card.text and "1.235" in card.text
    assert all(region["text"] in card.text for region in record["regions"])
    assert sum(path.suffix == ".safetensors" for path in out.iterdir()) == 1


@pytest.mark.parametrize("name", ["tiered", "private_finetune"])
def test_no_swap_of_a_key_is_in_what_goes_out(name: str, tmp_path: Path) -> None:
    model, method = CASES[name].start()
    out = gs.hub.save_pretrained(model, method, tmp_path / "out", name)
    keys = keys_in(method)
    assert keys
    for path in [RECORD, "README.md", "config.json"]:
        text = "".join((out / path).read_text().split())
        for key in keys:
            for swap in (*key.attn_heads, *key.mlp_cols):
                assert "".join(json.dumps(swap).split()) not in text


def test_a_keyed_model_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    model, method = CASES["tiered"].start()
    with key_of("llama").applied(model), pytest.raises(gs.errors.KeyStateError, match="needs the model in C1"):
        gs.hub.save_pretrained(model, method, tmp_path / "out", "tiers")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(gs.errors.ArtefactError, match="holds something already"):
        gs.hub.save_pretrained(model, method, tmp_path / "out", "tiers")
    with pytest.raises(gs.errors.ArtefactError, match="was made for a model"):
        gs.hub.save_pretrained(double("gpt_neo"), method, tmp_path / "other", "tiers")
    adapter, method = CASES["quarantine, route by label"].start()
    with pytest.raises(gs.errors.PlanError, match="is no checkpoint"):
        gs.hub.save_pretrained(adapter, method, tmp_path / "other", "quarantine")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_of_a_save_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = CASES["plain"].start()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gradsurgery.hub.publish.write_text", full)
    with pytest.raises(OSError, match="No space"):
        gs.hub.save_pretrained(model, method, tmp_path / "out", "plain")
    assert not list(tmp_path.iterdir())


def test_a_push_takes_the_folder_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = CASES["tiered"].start()
    out = gs.hub.save_pretrained(model, method, tmp_path / "out", "tiers")
    said: list[Any] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            said.append(token)

        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            said.append((repository, private, exist_ok))

        def upload_folder(self, **given: Any) -> str:
            said.append(given)
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert gs.hub.push_to_hub(out, "me/mine", token="t", commit_message="first") == "https://hub/commit"
    upload = {"repo_id": "me/mine", "folder_path": str(out), "commit_message": "first"}
    assert said == ["t", ("me/mine", True, True), upload]
    key_of("llama").save(out / "key.json")
    with pytest.raises(gs.errors.ArtefactError, match=r"key.json is a permutation key"):
        gs.hub.push_to_hub(out, "me/mine")
    with pytest.raises(gs.errors.ArtefactError, match="does not exist"):
        gs.hub.push_to_hub(tmp_path, "me/mine")
    assert len(said) == 3


def test_records_of_other_models_and_of_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = CASES["plain"].start()
    out = gs.hub.save_pretrained(model, method, tmp_path / "out", "plain")
    with pytest.raises(gs.errors.ArtefactError, match="and this model is"):
        gs.hub.load_record(out, double("gpt_neo"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(gs.errors.ArtefactError, match=r"is no folder, and no .* came from the hub"):
        gs.hub.load_record("nobody/nothing-here")
