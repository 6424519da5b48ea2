"""Compiled = eager: one graph, no recompilation when labels change, hooks honoured whenever they come."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import gradsurgery as gs
from tests.surgery.tiny import anatomy, batch, build, forget_of, gap, grads, sgtm, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches() -> list[dict[str, Tensor]]:
    """Labels that change: mixed, nobody, all forget, all retain."""
    out = [batch(seed=k) for k in range(4)]
    for k, (forget, retain) in enumerate(((False, False), (True, False), (False, True)), start=1):
        out[k]["forget"][:], out[k]["retain"][:] = forget, retain
    return out


def run(kind: str, method: gs.Method, compiled: dict[str, Any] | None) -> tuple[dict[str, Tensor], list[int]]:
    """Gradient of four batches, and the number of graphs after each."""
    model, graphs = build(kind), []
    host = torch.compile(model, **compiled) if compiled is not None else model
    with gs.attach(method, host) as surgery:  # type: ignore[arg-type]
        for data in batches():
            surgery.backward(data)
            graphs.append(counters["stats"]["unique_graphs"])
    return grads(model), graphs


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("llama", "mask"), ("gpt_neo", "zero"), pytest.param("gpt_neo", "detach", marks=pytest.mark.slow)],
)
def test_compiled_equals_eager_in_one_graph(kind: str, strategy: str) -> None:
    method = sgtm(kind, strategy, stages=False)
    eager, _ = run(kind, method, None)
    compiled, graphs = run(kind, method, {"backend": "aot_eager", "fullgraph": True})
    assert gap(eager, compiled) < 1e-6
    assert graphs == [1, 1, 1, 1]
    assert not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), [("llama", "mask"), ("gpt_neo", "detach"), ("gpt_neo", "zero")])
def test_inductor_equals_eager(kind: str, strategy: str) -> None:
    method = sgtm(kind, strategy, stages=False)
    compiled, graphs = run(kind, method, {"backend": "inductor", "fullgraph": True})
    assert gap(run(kind, method, None)[0], compiled) < 2e-6
    assert graphs == [1, 1, 1, 1]


@needs_compiler
@pytest.mark.slow
def test_two_losses_over_one_compiled_forward() -> None:
    def twice(outputs: Any, rows: Any, refs: Any) -> Tensor:
        return 2.0 * gs.losses.causal_lm(outputs, rows, refs)

    method = gs.Method([gs.Pass("p", {"a": gs.losses.causal_lm, "b": twice}, under=[gs.mask(forget_of())])])
    assert gap(run("llama", method, None)[0], run("llama", method, {"backend": "inductor"})[0]) < 2e-6


def test_a_surgery_attached_after_a_compiled_call_is_not_ignored() -> None:
    data = batch()
    eager, model = build(), build()
    host = torch.compile(model, backend="aot_eager")
    inputs = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "use_cache": False}
    before = host(**inputs).logits
    for called in (eager, host):
        with gs.attach(sgtm(stages=False), called) as surgery:  # type: ignore[arg-type]
            surgery.backward(data)
    assert gap(grads(eager), grads(model)) < 1e-6
    assert torch.equal(before, host(**inputs).logits)  # and after removal it is plain again


@pytest.mark.slow
def test_compiled_in_place_after_attach() -> None:
    eager, model, data = build(), build(), batch()
    with gs.attach(sgtm(stages=False), eager) as surgery:
        surgery.backward(data)
    with gs.attach(sgtm(stages=False), model) as surgery:
        model.compile(backend="aot_eager")
        surgery.backward(data)
    assert gap(grads(eager), grads(model)) < 1e-6


def test_applied_on_a_compiled_model() -> None:
    data, units = batch(), forget_of()
    model = build()
    host = torch.compile(model, backend="aot_eager")
    inputs = {"input_ids": data["input_ids"], "use_cache": False}
    with torch.no_grad():
        plain = host(**inputs).logits
        with gs.applied(model, gs.zero(units)):
            expected = model(**inputs).logits
        with gs.applied(host, gs.zero(units)):  # type: ignore[arg-type]
            assert torch.allclose(host(**inputs).logits, expected, atol=1e-6)
        assert torch.equal(host(**inputs).logits, plain)


def test_passes_with_their_own_transforms_and_token_labels_compile() -> None:
    forget = forget_of()
    tokens = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    passes = [
        gs.Pass(
            "a", under=[gs.mask(forget, where="tokens"), gs.scale(anatomy().structure("norm"), -0.75, where="forget")]
        ),
        gs.Pass("b", under=[gs.mask(~forget), gs.scale(forget, "1/passes")]),
    ]
    found = []
    for compiled in (False, True):
        model = build()
        host: Any = torch.compile(model, backend="aot_eager") if compiled else model
        with gs.attach(gs.Method(passes), host) as surgery:
            surgery.backward({**batch(), "tokens": tokens})
            surgery.backward({**batch(), "tokens": ~tokens})
        found.append(grads(model))
    assert gap(*found) < 1e-6


@pytest.mark.slow
def test_three_compiled_adamw_steps() -> None:
    found = []
    for compiled in (False, True):
        model = build("gpt_neo")
        host: Any = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        with gs.attach(sgtm("gpt_neo"), host, optimizer) as surgery:
            for data in batches()[:3]:
                surgery.backward(data)
                optimizer.step()
                optimizer.zero_grad()
        found.append(weights(model))
    assert gap(*found) < 2e-6


def test_compiled_backwards_keep_their_buffers_only_while_a_second_one_needs_them() -> None:
    """The setting is the process's own: it comes back, whoever held it, and however they end."""

    def settings() -> bool:
        return bool(torch._functorch.config.donated_buffer)

    before = settings()
    both = {"a": gs.losses.causal_lm, "b": gs.losses.causal_lm}
    held: list[gs.Surgery] = []
    for passes in ([gs.Pass("p")], [gs.Pass("p", both)], [gs.Pass("p", both)]):
        host: Any = torch.compile(build(), backend="aot_eager")
        surgery = gs.attach(gs.Method(passes), host)
        assert settings() == (before if not held else False)
        surgery.backward(batch(2))
        held += [surgery] * (len(surgery.method.passes[0].losses) > 1)
        assert settings() == (before if not held else False)
        if not held:
            surgery.remove()
    held.pop().remove()
    assert not settings()
    del surgery, held, host
    gc.collect()  # the last one dies with its model
    assert settings() == before
