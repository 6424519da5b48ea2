"""The page on projection runs as it stands, on a model and batches of the reader's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from conftest import tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "projection.md").read_text(encoding="utf-8")


def test_the_examples_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 64, (2, 4, 8))
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    names: dict[str, Any] = {"model": model, "loader": batches, "general_batches": batches, "code_batches": batches}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 7 and len(names["memory"]) == 6
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["first-task.safetensors"]


def test_names_on_the_page_exist() -> None:
    named = set(re.findall(r"`(?:gs\.)?([a-z][a-z_.]*)\(", PAGE)) | set(re.findall(r"gs\.([a-z_.]+)", PAGE))
    assert len(named) > 15
    for name in named:
        parts, found = name.rstrip(".").split("."), []
        for start in (gs, gs.methods, gs.losses, gs.Surgery):
            value: Any = start
            for part in parts:
                value = getattr(value, part, None)
            found.append(value)
        assert any(value is not None for value in found), name
