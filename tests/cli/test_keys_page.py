"""The page on keys runs as it stands, on a model of the reader's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from conftest import tiny_llama
from gradsurgery.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def test_the_examples_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "path" / "or" / "name")
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(0, 64, (4, 8))
    batches = [{"input_ids": ids, "labels": ids}] * 2
    rows = {"private_rows": ids[:2], "public_rows": ids[2:]}
    names: dict[str, Any] = {"loader": batches, "private_loader": batches, "public_loader": batches, **rows}
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.S):
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "gradsurgery" and main(arguments) == 0, line
    key, model = names["key"], names["model"]
    assert not torch.equal(names["public"], names["private"])
    assert set(names["scores"]) == {"C1", "C2"} and len(names["figures"]) == 3
    assert gs.keys.configuration_of(model).now == frozenset()
    again = tmp_path / "my-model-again" / "model.safetensors"
    assert again.read_bytes() == (tmp_path / "path" / "or" / "name" / "model.safetensors").read_bytes()
    shown = capsys.readouterr().out
    assert key.fingerprint in shown and not re.search(r"\[\d+, \d+\], \[\d+, \d+\]", shown)


def test_the_file_is_a_key(tmp_path: Path) -> None:
    (block,) = blocks("json")
    data = json.loads(block)
    del data["gradsurgery"]
    (tmp_path / "key.json").write_text(json.dumps(data))
    (tmp_path / "key.json").chmod(0o600)
    assert len(gs.PermutationKey.load(tmp_path / "key.json")) == 3


def test_names_on_the_page_exist() -> None:
    from gradsurgery.evaluation import tiers

    for name in re.findall(r"`([a-z]+_[a-z_]+)`", PAGE):
        known = [hasattr(tiers, name), hasattr(gs.PermutationKey, name), hasattr(gs.methods, name)]
        assert any(known) or name in ("save_pretrained", "from_pretrained") or name in gs.keys.key.LISTS, name
