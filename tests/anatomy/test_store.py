"""Anatomies on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

import gradsurgery as gs
from gradsurgery.errors import ArtefactError
from tests.anatomy.anatomies import anatomy_of
from tests.zoo.builder import build


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "phi3", "mixtral", "gpt_oss", "bloom", "t5", "vit", "deepseek_v3", "mamba2"]
)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    anatomy, path = anatomy_of(name), tmp_path / "folder" / "anatomy.json"
    anatomy.save(path)
    again = gs.Anatomy.load(path, build(name))
    assert again == anatomy and again.fingerprint == anatomy.fingerprint and str(again) == str(anatomy)
    assert again.structural == anatomy.structural
    for one, other in zip(anatomy.groups, again.groups, strict=True):
        assert list(one.units) == list(other.units) and list(one.consumers) == list(other.consumers)
        assert (one.exchange_classes, one.closed, one.riders) == (other.exchange_classes, other.closed, other.riders)
        assert (one.parent, one.parent_units) == (other.parent, other.parent_units)
    forget = anatomy.heads[:, -1:] | anatomy.neurons[:, :2] if anatomy.neurons.chosen else anatomy.heads[:, -1:]
    assert again.select(forget.text) == forget
    assert path.stat().st_size < 400_000 and [p.name for p in path.parent.iterdir()] == ["anatomy.json"]


def test_files_say_where_they_come_from(tmp_path: Path) -> None:
    anatomy_of("llama").save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["gradsurgery"] == gs.__version__ and data["fingerprint"] == anatomy_of("llama").fingerprint
    assert data["model"] == "LlamaForCausalLM"


def test_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    anatomy_of("llama").save(path)
    with pytest.raises(ArtefactError, match="made for LlamaForCausalLM"):
        gs.Anatomy.load(path, build("gpt2"))
    with pytest.raises(ArtefactError, match="k_proj"):
        gs.Anatomy.load(path, build("llama_mha"))
    assert gs.Anatomy.load(path) == anatomy_of("llama")


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ArtefactError, match="does not exist"):
        gs.Anatomy.load(path)
    anatomy_of("llama").save(path)
    text = path.read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:length])
        with pytest.raises(ArtefactError, match="truncated"):
            gs.Anatomy.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtefactError):
        gs.Anatomy.load(path)


@pytest.mark.parametrize("key", ["groups", "shapes", "aliases", "structural", "model", "format"])
@pytest.mark.parametrize("value", [None, 3, "x", [1], [{}], {"a": 1}, ...])
def test_damaged_files(key: str, value: object, tmp_path: Path) -> None:
    """Well-formed JSON that is no anatomy is refused by name, or (harmless strings) read; never another exception."""
    path = tmp_path / "a.json"
    anatomy_of("llama").save(path)
    data = json.loads(path.read_text())
    if value is ...:
        del data[key]
    else:
        data[key] = value
    path.write_text(json.dumps(data))
    try:
        loaded = gs.Anatomy.load(path)
    except ArtefactError as error:
        assert "a.json" in str(error)
    else:
        assert key == "model" and value == "x" and loaded.groups


@pytest.mark.parametrize(
    "field", ["kind", "layer", "footprints", "exchange_classes", "consumer_slots", "closed", "name"]
)
def test_damaged_groups(field: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    anatomy_of("llama").save(path)
    data = json.loads(path.read_text())
    whole = copy.deepcopy(data["groups"][0])
    for damage in ({**whole, field: {"a": []}}, {k: v for k, v in whole.items() if k != field}):
        data["groups"][0] = damage
        path.write_text(json.dumps(data))
        with pytest.raises(ArtefactError, match="damaged"):
            gs.Anatomy.load(path)


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    anatomy_of("gpt2").save(path)
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        anatomy_of("llama").save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]
