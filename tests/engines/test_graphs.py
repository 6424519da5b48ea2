"""Compiled, every method adds no graph break to the stock model's, and other labels compile nothing anew.

What does not hold is in one table, `LEFT`, which ``docs/engines.md`` shows with its reasons.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import gradsurgery as gs
from gradsurgery.errors import GradsurgeryError
from tests.engines import page
from tests.engines.equality import alone, compiling, trained
from tests.engines.methods import CASES, ROWS, Batch, optimizer_of
from tests.engines.test_equality import some
from tests.surgery.tiny import batch, build, gap

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")

WARM = 4  # steps after which every pass of every schedule has run


@dataclass(frozen=True)
class Left:
    """What a method still does under ``torch.compile``.

    Attributes:
        reason: A sentence that stands in the docs, too.
        single: Graphs that a pass over one row adds.
        refused: The method is.
    """

    reason: str
    single: int = 0
    refused: bool = False


ONE_ROW = Left("a pass that takes labelled rows alone and finds exactly one of them has a second graph", single=1)
LEFT: dict[str, Left] = {
    **dict.fromkeys(["gru", "gradient_ascent", "npo", "pcgrad", "opposed, labelled rows"], ONE_ROW),
    "quarantine, absorb by score": Left(
        "its second forward, over the rows that the first one flagged, runs outside of the graph"
    ),
    "rmu": Left("reads a block's activations, which a graph does not show", refused=True),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with compiling():
        yield


def labelled(method: gs.Method, kind: str, seed: int) -> Batch:
    """A batch of rows of which ``forget`` flags a third, none, all, or exactly one; ``retain`` the same of others."""
    data: Batch = batch(ROWS, seed=seed)
    rows = torch.arange(ROWS)
    if kind != "mixed":
        data["forget"] = {"none": rows < 0, "all": rows >= 0, "retained": rows < 0, "one": rows == seed % ROWS}[kind]
        data["retain"] = {"none": rows < 0, "all": rows < 0, "retained": rows >= 0, "one": rows != seed % ROWS}[kind]
    streams = sorted({p.stream for p in method.passes if p.stream})
    data.update({stream: batch(ROWS, seed=100 + 10 * seed + j) for j, stream in enumerate(streams)})
    return data


def graphs_of(name: str, kinds: list[str], **compiled: Any) -> list[int]:
    """Graphs compiled by the end of the first steps, all alike, and after each batch of another kind."""
    host, method = CASES[name].start()
    optimizer, out = optimizer_of(host), []
    with gs.attach(method, torch.compile(host, **compiled), optimizer) as surgery:  # type: ignore[arg-type]
        for seed, kind in enumerate(["mixed"] * WARM + kinds):
            surgery.backward(labelled(method, kind, seed))
            optimizer.step()
            optimizer.zero_grad()
            out.append(counters["stats"]["unique_graphs"])
    return out[WARM - 1 :]


def breaks() -> int:
    return sum(counters["graph_break"].values())


def stock() -> tuple[int, int]:
    """Graphs and breaks of the stock model on the same batches."""
    host: Any = torch.compile(build().double(), backend="aot_eager")
    for seed in range(WARM):
        data = batch(ROWS, seed=seed)
        inputs = {name: data[name] for name in ("input_ids", "attention_mask", "labels")}
        host(**inputs, use_cache=False).loss.backward()
    return counters["stats"]["unique_graphs"], breaks()


def test_the_stock_model_is_one_graph() -> None:
    assert stock() == (1, 0)


@pytest.mark.parametrize("name", some(["quarantine, route by label", "gru"]))
def test_no_graph_breaks_and_other_labels_compile_nothing(name: str) -> None:
    left = LEFT.get(name)
    kinds = ["none", "all", "retained", "mixed", "one"]
    if left is not None and left.refused:
        with pytest.raises(GradsurgeryError):
            graphs_of(name, kinds, backend="aot_eager")
        return
    first, *later, single = graphs_of(name, kinds, backend="aot_eager")
    assert later == [first] * len(later)
    assert single - first == (left.single if left else 0)
    assert not breaks()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("quarantine")] + ["gru"])
def test_inductor_compiles_whole_graphs_that_train_alike(name: str) -> None:
    def whole(backend: str, case: str) -> float:
        with compiling():
            found = trained(case, lambda host: torch.compile(host, backend=backend, fullgraph=True))
            return gap(alone(case), found)

    assert whole("inductor", name) < 5e-6  # 1e-6 measured, where a plain method has 1e-7: not traced yet


def test_rows_that_do_not_count_change_nothing_inside_a_graph() -> None:
    """A weight's gradient is that of the rows which teach, whatever the others hold."""
    from gradsurgery.adapters import graph

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator)
    taught = torch.tensor([True, False, True, True, False, False])
    step = torch.compile(graph.learned, backend="aot_eager", fullgraph=True)
    for shape in ((3, 4), (4,)):
        found: list[Tensor] = []
        for bad in (0.0, torch.inf, torch.nan):
            weight = torch.ones(shape, requires_grad=True)
            rows = torch.where(taught[:, None], x, bad)
            step(rows, weight, taught).backward(torch.where(taught[:, None], 1.0, bad).expand(6, shape[0]))
            assert weight.grad is not None
            found.append(weight.grad)
        assert bool(found[0].isfinite().all() and found[0].any())
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_page_names_all_that_is_left() -> None:
    text = " ".join(page.PAGE.read_text(encoding="utf-8").split())
    for name, left in LEFT.items():
        row = re.search(rf"\| [^|]*{re.escape(name)}[^|]* \| {re.escape(left.reason)}[^|]* \|", text)
        assert row, f"docs/engines.md does not say of {name}: {left.reason}"
