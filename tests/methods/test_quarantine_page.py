"""The page on quarantines runs as it stands, on a model and batches of the reader's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from conftest import tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "quarantine.md").read_text(encoding="utf-8")


def test_the_examples_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    names_before = list(model.state_dict())
    ids = torch.randint(3, 64, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    flag = torch.tensor([True, False, False, True])
    batches = [{"input_ids": x, "labels": x, "flag": flag} for x in ids]
    pair = tuple({"input_ids": x, "labels": x} for x in ids)
    more = {"prompts": ids[0, :, :3], "forget_ids": ids[0], "retain_ids": ids[1]}
    names: dict[str, Any] = {"model": model, "loader": batches, "pairs": [pair], **more}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    own = [block for block in blocks if "integrations" not in block]  # TRL's loop: tests/integrations
    for block in own:
        exec(block, names)
    assert (len(blocks), len(own)) == (7, 6) and [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]
    assert list(model.state_dict()) == names_before and all(p.requires_grad for p in model.parameters())
    assert names["found"].curve[0].step >= 0 and names["rollouts"].shape == (4, 7)
    gs.adapters.load("kept.safetensors", model).remove()


def test_names_on_the_page_exist() -> None:
    named = set(re.findall(r"`(?:gs\.)?([a-z][a-z_.]*)\(", PAGE)) | set(re.findall(r"gs\.([a-zA-Z_.]+)", PAGE))
    assert len(named) > 12
    for name in named - {"loss.backward", "log_extra"}:  # torch's, TRL's
        parts, found = name.rstrip(".").removeprefix("adapter.").split("."), []
        for start in (gs, gs.adapters, gs.adapters.Adapter, gs.methods, gs.estimators):
            value: Any = start
            for part in parts:
                value = getattr(value, part, None)
            found.append(value)
        assert any(value is not None for value in found), name
