"""Every method on every engine ends where the plain loop does, or says why it cannot run there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import gradsurgery as gs
from tests.engines import page
from tests.engines.equality import RANKS, TOLERANCE, Cell, alone, cell
from tests.engines.methods import CASES, QUICK, optimizer_of, public_methods
from tests.engines.ranks import full
from tests.surgery.tiny import batch, build, gap, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

REFUSED = {("compile", "rmu"): "calls it inside of compiled code, where it cannot be recorded"}
"""What is refused, by engine and method: a pattern that the sentence matches."""

COMPILED = ["warp", "opposed"]  # seconds each; all others are slow tests


def some(names: list[str]) -> list[Any]:
    """All methods; those not named are slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def check(engine: str, name: str, found: Cell) -> None:
    if (reason := REFUSED.get((engine, name))) is not None:
        assert isinstance(found, str) and re.search(reason, found), (engine, name, found)
    else:
        assert isinstance(found, float) and found <= TOLERANCE[engine], (engine, name, found)


def test_no_method_is_forgotten() -> None:
    assert {name.split(",")[0] for name in CASES} == public_methods()


@pytest.mark.parametrize("name", CASES)
def test_the_plain_loop_trains(name: str) -> None:
    host, _ = CASES[name].start()
    assert gap(alone(name), full(host)) > 1e-3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["accumulation", "checkpointing"])
def test_one_process(engine: str, name: str) -> None:
    check(engine, name, cell(engine, name))


@pytest.mark.parametrize("name", some(QUICK))
@pytest.mark.parametrize("engine", ["bf16", "scaler", "fused", "foreach"])
def test_one_process_more(engine: str, name: str) -> None:
    check(engine, name, cell(engine, name))


@pytest.mark.parametrize("name", some(COMPILED))
def test_compiled(name: str) -> None:
    check("compile", name, cell("compile", name))


@pytest.mark.parametrize("scope", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_two_ranks(scope: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(f"{scope}_ranks")
    names = QUICK if scope == "quick" else list(CASES)
    engines = [engine for engine in RANKS if engine in found]
    assert len(engines) == (len(RANKS) if scope == "all" else 2)
    for engine in engines:
        assert list(found[engine]) == names
        for name, result in found[engine].items():
            check(engine, name, result)


def test_the_page_shows_this_matrix() -> None:
    """Its figures are of the run that wrote it; its rows, columns and bounds are of today."""
    table = page.read()
    assert list(table) == list(CASES)
    for name, cells in table.items():
        assert list(cells) == list(page.COLUMNS)
        for engine, shown in cells.items():
            check(engine, name, shown)


def test_the_examples_of_the_page_run() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning_fabric")
    blocks = re.findall(r"```python\n(.*?)```", page.PAGE.read_text(encoding="utf-8"), re.S)
    blocks = [block for block in blocks if "tp_size" not in block]  # needs ranks: test_tensor_parallel.py
    assert len(blocks) == 5
    for block in blocks:
        model = build()
        before = weights(model)
        names: dict[str, Any] = {
            "model": model,
            "method": gs.methods.plain(),
            "loader": [batch(4)],
            "windows": [[batch(2), batch(3)]],
        }
        names |= {"torch": torch, "gs": gs, "optimizer": optimizer_of(model)}
        exec(block, names)
        names.get("surgery", gs.attach(gs.methods.plain(), build())).remove()
        if "surgery.backward" in block:
            assert gap(weights(model), before) > 0
