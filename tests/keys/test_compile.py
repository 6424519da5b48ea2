"""Keys on compiled models: swaps are seen without recompiling; tiered training in compiled graphs equals eager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import gradsurgery as gs
from tests.keys.tiers import key_of
from tests.surgery.tiny import anatomy, batch, build, gap, weights

pytestmark = pytest.mark.filterwarnings("ignore")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
EAGER: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "options",
    [EAGER, pytest.param({"backend": "inductor", "fullgraph": True}, marks=[needs_compiler, pytest.mark.slow])],
    ids=["aot_eager", "inductor"],
)
@pytest.mark.parametrize("kind", ["gpt_neo", pytest.param("llama", marks=pytest.mark.slow)])
def test_swaps_are_seen_without_recompiling(kind: str, options: dict[str, Any]) -> None:
    """Outputs and gradients of both tiers, in turn."""
    plain, model, key = build(kind), build(kind), key_of(kind)
    host: Any = torch.compile(model, **options)
    data = batch(4)
    inputs = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "use_cache": False}
    outputs = []
    for turn in range(4):
        for place, called in ((plain, plain), (model, host)):
            if turn:
                (key.apply_ if turn % 2 else key.unapply_)(place)
            logits = called(**inputs).logits
            logits.square().sum().backward()
            outputs.append(logits.detach())
        assert torch.allclose(outputs[-2], outputs[-1], rtol=1e-5, atol=1e-6)
        assert graphs() == 1
    assert not torch.allclose(outputs[0], outputs[2], rtol=1e-2)
    assert torch.equal(outputs[1], outputs[5])
    named = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert p.grad is not None and named[name].grad is not None
        assert torch.allclose(p.grad, named[name].grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


@pytest.mark.parametrize("step_in", ["C1", pytest.param("C2", marks=pytest.mark.slow)])
def test_tiered_steps_equal_eager(step_in: Any) -> None:
    """After the first step no graph is made any more."""
    found = []
    for compiled in (False, True):
        model = build("gpt_neo")
        host: Any = torch.compile(model, **EAGER) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        made = []
        method = gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), step_in=step_in)
        with gs.attach(method, host, optimizer) as surgery:
            for k in range(3):
                surgery.backward(batch(4, seed=k))
                optimizer.step()
                optimizer.zero_grad()
                made.append(graphs())
        found.append(weights(model))
    assert gap(*found) < 2e-6
    assert made[0] <= 2
    assert made[0] == made[1] == made[2]
    assert not counters["graph_break"]
