"""The shipped configurations parse, build models of the size they name, and their sample keys fit them."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

import gradsurgery as gs
from gradsurgery.data import load_tokenizer
from gradsurgery.errors import KeyWarning
from gradsurgery.runs import pretrain

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs" / "tiered").glob("*.yaml"))
THOUSANDS = {"34m": 33_929, "64m": 64_117, "125m": 124_462, "254m": 254_054}
"""As published, with a bias of the output that stock GPT-Neo does not have."""
SCRIPTS = ("tiered_pretrain", "baseline_pretrain", "private_finetune", "tiered_inference")


@pytest.fixture(scope="module")
def recipes() -> dict[str, ModuleType]:
    sys.path.insert(0, str(RECIPES))  # as python does for a script
    try:
        out = {}
        for name in SCRIPTS:
            spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
            assert spec is not None and spec.loader is not None
            out[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(out[name])
    finally:
        sys.path.remove(str(RECIPES))
    return out


def parse(recipe: ModuleType, *arguments: str):
    import jsonargparse

    return jsonargparse.auto_cli(recipe.Config, as_positional=False, args=list(arguments))


def on_meta(config) -> PreTrainedModel:
    with torch.device("meta"):
        model = pretrain.starting_model(config, load_tokenizer())
    model.tie_weights()
    return model


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_models_have_the_size_they_name(recipes: dict[str, ModuleType], path: Path) -> None:
    for script in ("tiered_pretrain", "baseline_pretrain"):
        config = parse(recipes[script], "--config", str(path))
        width = config.model.options["hidden_size"]
        parameters = on_meta(config).num_parameters() + (50_257 - len(load_tokenizer())) * width
        assert (parameters + 50_257) // 1000 == THOUSANDS[path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_sample_keys_fit_and_are_what_they_say(recipes: dict[str, ModuleType], path: Path) -> None:
    config = parse(recipes["tiered_pretrain"], "--config", str(path))
    file = path.parent / "keys" / f"sample_{path.stem}.json"
    assert "protects nothing" in json.loads(file.read_text())["gradsurgery"]["note"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KeyWarning)  # git keeps no owner-only mode
        key = gs.PermutationKey.load(file)
    anatomy = gs.dissect(on_meta(config))
    swappable = (anatomy.heads | anatomy.neurons).numel()
    assert 0.199 < key.region(anatomy).numel() / swappable <= 0.2
    options = config.model.options
    dimensions = gs.keys.Dimensions(
        num_layers=options["num_layers"],
        num_heads=options["num_heads"],
        hidden_size=options["hidden_size"],
        mlp_dim=options["intermediate_size"],
    )
    assert key == gs.PermutationKey.generate(dimensions, fraction=0.2, attention_ratio=0.25, seed=42)
    method = recipes["tiered_pretrain"].build_method(config, [key], anatomy)
    assert [p.name for p in method.passes] == ["C1", "C2"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_schedules_are_those_of_the_original(recipes: dict[str, ModuleType], path: Path) -> None:
    config = parse(recipes["tiered_pretrain"], "--config", str(path))
    train = config.train
    assert train.schedule() == {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 6e-5},
    }
    assert (train.steps, train.learning_rate, int(train.steps * train.warmup)) == (71_393, 6e-4, 500)
    assert (train.weight_decay, train.beta2, train.max_grad_norm) == (0.1, 0.95, 1.0)
    assert config.rows % (8 * train.accumulation) == 0 and config.draw.fraction == 0.2


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_default_is_the_embedded_one(recipes: dict[str, ModuleType], script: str) -> None:
    assert parse(recipes[script]) == recipes[script].Config()


def test_keys_are_drawn_from_the_systems_entropy_by_default(recipes: dict[str, ModuleType]) -> None:
    assert recipes["tiered_pretrain"].Config().key_seed is None
    assert recipes["private_finetune"].Config().pretrain.key_seed is None


def test_several_keys_are_read_from_the_command_line(recipes: dict[str, ModuleType]) -> None:
    assert parse(recipes["private_finetune"], "--key", "a.json").key == "a.json"
    assert parse(recipes["private_finetune"], "--key", "[a.json,b.json]").key == ["a.json", "b.json"]
