"""The shipped configurations parse, and build models of the size they name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gradsurgery as gs
from gradsurgery.data import load_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("sgtm_*/*_*m.yaml"))


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipes() -> dict[str, ModuleType]:
    return {name: load_recipe(name) for name in ("sgtm_bilingual", "sgtm_topics")}


def test_every_size_of_the_paper_is_there() -> None:
    sizes = {f"tinystories_{size}m" for size in (8, 18, 34, 64)} | {f"wikipedia_{size}m" for size in (34, 64, 125, 254)}
    assert {path.stem for path in CONFIGS} == sizes


def load(recipe: ModuleType, arguments: list[str]):
    import jsonargparse

    return jsonargparse.auto_cli(recipe.Config, as_positional=False, args=arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_models_have_the_size_of_the_paper(recipes: dict[str, ModuleType], path: Path) -> None:
    recipe = recipes[path.parent.name]
    config = load(recipe, ["--config", str(path)])
    tokenizer = load_tokenizer()
    with torch.device("meta"):
        model = recipe.build_model(config, tokenizer)
    model.tie_weights()  # transformers 5.0 leaves that out on meta
    vocabulary, width = 50_257, config.model.options["hidden_size"]
    parameters = model.num_parameters() + (vocabulary - len(tokenizer)) * width
    named = int(path.stem.rpartition("_")[2].removesuffix("m"))
    assert abs(parameters / 1e6 - named) < 0.05 * named + 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_their_method_fits_their_model(recipes: dict[str, ModuleType], path: Path) -> None:
    recipe = recipes[path.parent.name]
    config = load(recipe, ["--config", str(path)])
    with torch.device("meta"):
        model = recipe.build_model(config, load_tokenizer())
    model.tie_weights()
    method, forget = recipe.build_method("sgtm", config, model)
    layers = config.model.options["num_layers"]
    assert forget.count == layers * 65
    assert isinstance(method, gs.Method) and "sgtm" in method.explain(model)


def test_the_default_is_the_embedded_one(recipes: dict[str, ModuleType]) -> None:
    for recipe in recipes.values():
        assert load(recipe, []) == recipe.Config()
