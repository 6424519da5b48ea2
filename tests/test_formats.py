"""Every artefact says which version wrote it; older formats become the present one, newer ones name the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gradsurgery as gs
from gradsurgery import formats
from gradsurgery.cli.key.apply import applied_keys, mark
from gradsurgery.surgery.checkpoint import load_state, save_state
from tests.checkpoints.loop import Run
from tests.keys.tiers import double
from tests.surgery.tiny import batch


def basis() -> Any:
    return gs.estimators.activation_basis(double("llama"), [batch(seed=50)], "mlp")


def importance() -> Any:
    return gs.estimators.importance(double("llama"), basis(), [batch(seed=51)])


def adapter() -> Any:
    return gs.adapters.add(double("llama"), "all-linear", rank=2)


def direction() -> Any:
    mine = adapter()
    return gs.estimators.paired_direction(mine.model, mine, [(batch(3, seed=53), batch(3, seed=54))], noise="keep")


def memory() -> Any:
    return gs.estimators.gradient_memory(double("llama"), [batch(4, seed=52)], count=2)


def saved(make: Callable[[], Any], name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make().save(folder / name)
        return folder / name

    return write


def state(folder: Path) -> Path:
    run = Run("plain")
    save_state(run.surgery.state_dict(), folder)
    run.end()
    return folder / "surgery.json"


def checkpoint(folder: Path) -> Path:
    run = Run("plain")
    path = run.save(folder)
    run.end()
    return path / "checkpoint.json"


def marked(folder: Path) -> Path:
    from gradsurgery.cli.key.apply import MARK

    (folder / MARK).write_text(json.dumps(mark(["abc"], "a model")))
    return folder / MARK


def key(folder: Path) -> Path:
    gs.PermutationKey.generate(gs.dissect(double("llama")), fraction=0.1, seed=0).save(folder / "key.json")
    return folder / "key.json"


def resumed(path: Path) -> None:
    run = Run("plain")
    try:
        run.load(path.parent)
    finally:
        run.end()


ARTEFACTS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "an anatomy": (saved(lambda: gs.dissect(double("llama")), "a.json"), gs.Anatomy.load),
    "a permutation key": (key, gs.PermutationKey.load),
    "a basis": (saved(basis, "a.safetensors"), gs.estimators.Basis.load),
    "importances": (saved(importance, "a.safetensors"), lambda path: gs.estimators.Importance.load(path, basis())),
    "masks": (
        saved(lambda: gs.estimators.top_k(importance(), 0.1), "a.safetensors"),
        lambda path: gs.estimators.Masks.load(path, basis()),
    ),
    "a direction": (saved(direction, "a.safetensors"), lambda path: gs.estimators.Direction.load(path, adapter())),
    "a gradient memory": (
        saved(memory, "a.safetensors"),
        lambda path: gs.estimators.GradientMemory.load(path, double("llama")),
    ),
    "an adapter": (saved(adapter, "a.safetensors"), lambda path: gs.adapters.load(path, double("llama"))),
    "what a checkpoint says of its keys": (marked, lambda path: applied_keys(path.parent)),
    "the state of a surgery": (state, lambda path: load_state(path.parent)),
    "a checkpoint": (checkpoint, resumed),
}
ELSEWHERE = {"precomputed log-probabilities", "prepared articles", "what a method did"}
"""They are folders, written by longer runs; their own tests read and damage them."""


def test_every_kind_is_tested() -> None:
    assert set(ARTEFACTS) | ELSEWHERE == set(formats.CURRENT)


def header_of(path: Path) -> Any:
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        return data.get("gradsurgery") if isinstance(data.get("gradsurgery"), dict) else data
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["gradsurgery"])


def rewritten(path: Path, **changes: Any) -> None:
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        (data["gradsurgery"] if isinstance(data.get("gradsurgery"), dict) else data).update(changes)
        path.write_text(json.dumps(data))
        return
    header = {**header_of(path), **changes}
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"gradsurgery": json.dumps(header)})


@pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")
@pytest.mark.parametrize("kind", ARTEFACTS)
def test_versions(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = ARTEFACTS[kind]
    path = write(tmp_path)
    header = header_of(path)
    name = "version" if "version" in header else "gradsurgery"
    assert header[name] == gs.__version__ and header["format"] == formats.CURRENT[kind]
    read(path)
    rewritten(path, format=7, **{name: "9.1.0"})
    with pytest.raises(gs.errors.ArtefactError, match=r"format 7 by gradsurgery 9.1.0.*pip install --upgrade"):
        read(path)
    rewritten(path, format="one")
    with pytest.raises(gs.errors.ArtefactError, match=r"is not .* of format"):
        read(path)
    rewritten(path, format=formats.CURRENT[kind])
    read(path)
    seen: list[Any] = []

    def upgrade(data: Any) -> Any:
        seen.append(data)
        return data

    monkeypatch.setitem(formats.CURRENT, kind, formats.CURRENT[kind] + 1)  # as in a later version
    monkeypatch.setattr(formats, "UPGRADES", {(kind, formats.CURRENT[kind] - 1): upgrade})
    read(path)
    assert seen


def test_upgrades_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.CURRENT, "masks", 3)
    steps: dict[Any, Any] = {
        ("masks", 1): lambda data: {"two": data["one"] + 1},
        ("masks", 2): lambda data: {"three": data["two"] + 1},
    }
    monkeypatch.setattr(formats, "UPGRADES", steps)
    given = {"format": 1, "one": 1}
    assert formats.upgraded(given, "masks", "a file") == {"format": 3, "three": 3}
    assert given == {"format": 1, "one": 1}
    assert formats.upgraded({"two": 5, "format": 2}, "masks", "a file") == {"format": 3, "three": 6}
    assert formats.upgraded({"one": 1}, "masks", "a file", before=1) == {"format": 3, "three": 3}
