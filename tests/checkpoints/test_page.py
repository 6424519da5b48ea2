"""The page on checkpoints runs as it stands, twice: the second time it resumes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from conftest import tiny_llama

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_page_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    ids = torch.randint(0, 64, (4, 8))
    labels = {"forget": torch.tensor([True, False, False, False]), "retain": torch.tensor([False, True, True, False])}
    weights, seen = [], []
    for steps in (3, 5, 5):  # the third has nothing left to do but the last step
        model = tiny_llama()
        anatomy = gs.dissect(model)
        method = gs.methods.sgtm(anatomy, anatomy.heads[:, -2:])
        loader = [{"input_ids": ids, **labels}] * steps
        names: dict[str, Any] = {"model": model, "method": method, "loader": loader}
        exec(blocks[0], names)
        names["surgery"].remove()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        seen.append(names["seen"])
        kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert seen == [3, 5, 5] and kept == ["step-00000002", "step-00000004"]
    assert all(torch.equal(weights[1][n], weights[2][n]) for n in weights[1])
    assert not all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])
    exec(blocks[1], names)
    assert names["record"]["method"] == "SGTM"
