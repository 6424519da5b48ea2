"""A model cut on two ranks by transformers' tensor-parallel plan, or by torch's, trains as the whole one does."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch.distributed as dist

from tests.engines.methods import CASES
from tests.engines.parallel_cases import FAMILIES, METHODS, QUICKLY
from tests.engines.parallel_refusals import REFUSALS
from tests.engines.parallel_tools import QUICK_TOOLS, TOOLS
from tests.engines.test_ranks import launch

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
    pytest.mark.skipif(
        find_spec("transformers.distributed.tensor_parallel") is None,
        reason="needs plans of transformers that cut DTensors",
    ),
]
SLOW = pytest.mark.slow
NAMES = [name if name in QUICKLY else pytest.param(name, marks=SLOW) for name in METHODS]
TOOL_NAMES = [name if name in QUICK_TOOLS else pytest.param(name, marks=SLOW) for name in TOOLS]

TOLERANCE = 1e-12
"""As in the matrix: double weights that moved by 3e-2."""
VANISHING = 1e-10
"""The biases of keys shift all scores of a query alike, so that their gradient is rounding, of which AdamW makes steps,
in the stock model too: the learning rate times 1e-16 / 1e-8, the second being what AdamW adds to its denominator."""

SAID = {
    "experts": "'moe_tp_experts' for model.layers.0.mlp.experts, which runs experts on local weights",
    "experts, applied": "'moe_tp_experts' for model.layers.0.mlp.experts",
    "experts, ablated": "in which no rank holds consecutive entries",
    "norms of heads": "_norm.weight has a gradient on each rank of this tensor-parallel model that is of its own heads",
    "a table by torch": "model.embed_tokens.weight (Embedding) is laid out over ranks",
    "tokens dealt out": "model.norm.weight (LlamaRMSNorm) is laid out over ranks",
    "FSDP2": "FSDP2 over tensor-parallel ranks cuts weights twice",
    "DDP": "DDP around a tensor-parallel model",
    "compile": "leave the model uncompiled",
    "adapter": "adds up whole inputs and outputs of layers",
    "peft": "adds up whole inputs and outputs of layers",
    "prune": "prune_: model.embed_tokens.weight is sharded",
    "activations": "activations('model.layers.1.mlp.gate_proj'): each rank of a tensor-parallel model may have a part",
    "basis": "take the basis on one process",
    "importance": "importance: model.layers.0.mlp.gate_proj.weight is sharded",
    "other rows": "the ranks disagree on the batch, which all ranks of a tensor-parallel model must be given alike",
    "another key": "the ranks disagree on the passes of the method",
}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes run everything, one thing after the other; all methods where slow tests are asked for."""
    slow = any(item.get_closest_marker("slow") and item.fspath == request.node.fspath for item in request.session.items)
    which = "all" if slow else "quick"
    found: dict[str, Any] = launch(
        "tests.engines.parallel_ranks", which, directory=tmp_path_factory.mktemp("parallel"), limit=1200
    )
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_step_as_one_process(name: str, results: dict[str, Any]) -> None:
    found = results["methods"][name]
    if name.startswith("quarantine"):
        assert found == results["refusals"]["adapter"]
        return
    apart, moved = found
    kind, _, method = name.partition(", ")
    stock = results["methods"][f"{kind}, plain"][0] if kind in FAMILIES else 0.0
    assert apart <= (VANISHING if method == "plain" else max(TOLERANCE, 12 * stock)), (found, stock)
    assert moved > 1e-2, found


def test_no_method_is_left_out() -> None:
    assert not CASES.keys() - METHODS.keys()
    assert not REFUSALS.keys() ^ SAID.keys()


@pytest.mark.parametrize("name", TOOL_NAMES)
def test_tools_see_the_whole_model(name: str, results: dict[str, Any]) -> None:
    assert results["tools"][name] <= TOLERANCE


def test_torchs_own_plans_are_equal_too(results: dict[str, Any]) -> None:
    assert len(results["torch"]) == 2
    assert all(apart <= TOLERANCE for apart in results["torch"].values()), results["torch"]


def test_a_rank_holds_its_part_of_any_set_of_entries(results: dict[str, Any]) -> None:
    assert results["entries"] == 0


@pytest.mark.parametrize("name", SAID)
def test_the_rest_is_refused_on_all_ranks_with_the_reason(name: str, results: dict[str, Any]) -> None:
    assert SAID[name] in results["refusals"][name]
    assert all(SAID[name] in others[name] for others in results["refusals of the others"])
