"""Selection of whole parameters by name."""

from __future__ import annotations

import re

import pytest
from torch import nn

import gradsurgery as gs
from gradsurgery.errors import SelectionError
from tests.anatomy.anatomies import anatomy_of
from tests.zoo.builder import build


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("llama")


def names(model: nn.Module, pattern: object, **rest: object) -> set[str]:
    return set(gs.region(model, pattern, **rest).parameters())  # type: ignore[arg-type]


def test_every_way_to_name_parameters(llama: nn.Module) -> None:
    everything = {name for name, _ in llama.named_parameters()}
    mlp = {name for name in everything if ".layers.1.mlp." in name}
    q = {name for name in everything if ".q_proj." in name}
    assert names(llama, "model.layers.1.mlp.up_proj.weight") == {"model.layers.1.mlp.up_proj.weight"}
    assert names(llama, "model.layers.1.mlp") == mlp
    assert names(llama, "layers.1.mlp") == mlp
    assert names(llama, "q_proj") == q
    assert names(llama, "model.layers.*.q_proj.*") == q
    assert names(llama, r"model\.layers\.(0|1)\..*q_proj\.weight") == {n for n in q if ".2." not in n}
    assert names(llama, re.compile(r".*\.q_proj\.weight")) == q
    assert names(llama, ["q_proj", "layers.1.mlp"]) == q | mlp
    assert names(llama, "*") == everything
    assert names(llama, "*", exclude="model.layers") == {n for n in everything if ".layers." not in n}
    assert names(llama, "layers.1") >= mlp and not names(llama, "layers.1") & names(llama, "layers.0")


def test_all_linear() -> None:
    for name, head in (("llama", "lm_head.weight"), ("gpt2", "transformer.wte.weight")):
        model = build(name)
        found = names(model, "all-linear")
        kinds = {type(model.get_submodule(n.rsplit(".", 1)[0])).__name__ for n in found}
        assert kinds <= {"Linear", "Conv1D"} and head not in found
        assert len(found) == {"llama": 7 * 3, "gpt2": 4 * 2 * 3}[name]


def test_nothing_found_is_an_error_with_near_names(llama: nn.Module) -> None:
    with pytest.raises(SelectionError, match=r"q_proj"):
        gs.region(llama, "q_projj")
    with pytest.raises(SelectionError, match="matches no parameter"):
        gs.region(llama, "(")
    with pytest.raises(SelectionError, match="matches no parameter"):
        gs.region(llama, "q_proj", exclude="nothing_like_it")
    with pytest.raises(SelectionError, match="leaves no parameter"):
        gs.region(llama, "q_proj", exclude="self_attn")


def test_an_anatomy_selects_too(llama: nn.Module) -> None:
    anatomy = anatomy_of("llama")
    assert anatomy.region("q_proj") == gs.region(llama, "q_proj")
    assert anatomy.structure("embedding") == gs.region(llama, ["embed_tokens", "lm_head"]) or anatomy.structure(
        "embedding"
    )
    assert set(anatomy.structure("norm").parameters()) == {n for n, _ in llama.named_parameters() if "norm" in n}
