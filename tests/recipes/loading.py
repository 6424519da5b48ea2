"""What tests of recipes share: a recipe as a module, and the smallest model that it trains."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 64,
    "attention_types": [[["global"], 2]],
}


def load(script: Path) -> ModuleType:
    """A recipe's module; registered, since dataclasses look their module up."""
    name = f"{script.stem}_recipe"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
