"""The README's quick start runs as it stands, on a model of the reader's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import gradsurgery as gs
from conftest import tiny_llama

ROOT = Path(__file__).parent.parent


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def quick_start() -> str:
    return examples()[0]


def test_quick_start_runs_as_it_stands(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (4, 8))
    labels = {"forget": torch.tensor([True, False, False, False]), "retain": torch.tensor([False, True, True, False])}
    names = {"loader": [{"input_ids": ids, **labels}] * 2}
    exec(quick_start().replace("path/or/name", str(tmp_path)), names)
    model, forget = names["model"], names["forget"]
    for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
        assert not parameter[forget.of(name).mask()].any()  # type: ignore[attr-defined]


def test_the_example_of_tiers_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    ids = torch.randint(0, 64, (4, 8))
    names = {"gs": gs, "model": model, "anatomy": gs.dissect(model), "loader": [{"input_ids": ids}] * 2}
    names |= {"optimizer": torch.optim.AdamW(model.parameters()), "inputs": {"input_ids": ids}}
    exec(examples()[1], names)
    assert not torch.equal(names["secret"], model(input_ids=ids).logits)  # type: ignore[arg-type]


def test_the_commands_of_the_readme_are_the_ones_that_ci_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'pip install -c constraints.txt -e ".[recipes]" && python recipes/sgtm_bilingual.py\n' in text
    assert 'pip install -c constraints.txt -e ".[recipes,test]" && pytest\n' in text
