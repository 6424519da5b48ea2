"""Bases, importances and masks on disk: what is read is what was written, or an error says what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import ArtefactError
from gradsurgery.estimators import Basis, Importance, Masks
from tests.estimators.test_basis import basis_of, batch
from tests.surgery.tiny import build
from tests.transforms.cases import case

estimators: Any = gs.estimators


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit"])
@pytest.mark.parametrize("options", [{}, {"side": "output"}, {"top_k": 3, "dtype": torch.bfloat16}], ids=str)
def test_a_basis_comes_back_as_it_was(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    here = case(name)
    basis = basis_of(here.model, [here.batch], **options)
    basis.save(tmp_path / "basis.safetensors")
    again = Basis.load(tmp_path / "basis.safetensors", here.model)
    assert again.digest == basis.digest and again.sites == basis.sites and again.about == basis.about
    assert again.table() == basis.table() and again.side == basis.side
    assert all(torch.equal(again[n], basis[n]) and again[n].dtype == basis[n].dtype for n in basis.sites)
    assert [path.name for path in tmp_path.iterdir()] == ["basis.safetensors"]


def test_the_three_phases_on_disk(tmp_path: Path) -> None:
    model = build()
    basis = basis_of(model, [batch()])
    scores = estimators.importance(model, basis, [batch()])
    masks = estimators.top_k(scores, 0.1)
    basis.save(tmp_path / "basis")
    scores.save(tmp_path / "scores")
    masks.save(tmp_path / "masks")
    basis = Basis.load(tmp_path / "basis", model)
    again = Importance.load(tmp_path / "scores", basis)
    assert all(torch.equal(again[n], scores[n]) for n in basis) and again.about == scores.about
    found = Masks.load(tmp_path / "masks", basis)
    assert all(torch.equal(found[n], masks[n]) for n in basis) and dict(found.about) == dict(masks.about)
    assert (tmp_path / "masks").stat().st_size < sum(m.numel() for m in masks.values()) / 8 + 20_000
    gs.Coordinates(basis, found)
    identity = estimators.identity_basis(model)
    identity.save(tmp_path / "identity")
    assert Basis.load(tmp_path / "identity", model).digest == identity.digest


def test_a_mismatch_says_what_differs(tmp_path: Path) -> None:
    model = build()
    basis = basis_of(model, [batch()])
    basis.save(tmp_path / "basis")
    masks = estimators.top_k(estimators.importance(model, basis, [batch()]), 0.1)
    masks.save(tmp_path / "masks")
    with pytest.raises(ArtefactError, match=r"made for LlamaForCausalLM, used with GPTNeoForCausalLM"):
        Basis.load(tmp_path / "basis", build("gpt_neo"))
    with pytest.raises(ArtefactError, match=r"\[20, 24\] there and \[28, 24\] here"):
        Basis.load(tmp_path / "basis", build(intermediate_size=28))
    with pytest.raises(ArtefactError, match="were float32, and they are bfloat16 here"):
        Basis.load(tmp_path / "basis", build().to(torch.bfloat16))
    Basis.load(tmp_path / "basis", build().to(torch.bfloat16), any_dtype=True)
    others = {
        "data": basis_of(model, [batch(seed=1)]),
        "options": basis_of(model, [batch()], normalise="token"),
        "layers": basis_of(model, [batch()], "mlp"),
        "kept": basis.top(4),
    }
    for other in others.values():
        with pytest.raises(ArtefactError, match="belongs to another basis"):
            Masks.load(tmp_path / "masks", other)
        with pytest.raises(ArtefactError, match="another basis"):
            gs.Coordinates(other, masks)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "basis"
    with pytest.raises(ArtefactError, match="does not exist"):
        Basis.load(path)
    basis = basis_of(build(), [batch()])
    basis.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match="truncated"):
        Basis.load(path)
    changed = bytearray(whole)
    changed[-40] ^= 0xFF  # in the last tensor
    middle = len(whole) // 2
    changed[middle] ^= 0xFF
    path.write_bytes(bytes(changed))
    with pytest.raises(ArtefactError, match="damaged"):
        Basis.load(path)
    path.write_bytes(whole)
    with pytest.raises(ArtefactError, match="holds a basis; expected masks"):
        Masks.load(path, basis)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArtefactError, match="no artefact of gradsurgery"):
        Basis.load(path)
