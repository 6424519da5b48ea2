"""PEFT's LoRA adapters as the kept part and the quarantine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.adapters import Score
from gradsurgery.errors import ArtefactError, PlanError
from tests.adapters.tiny import ROWS, batch, clear, gap, grads, logits, model_of, size, stir

peft = pytest.importorskip("peft")


def peft_model(name: str = "llama", **second: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]}
    config |= {"fan_in_fan_out": True} if name == "gpt2" else {}
    torch.manual_seed(0)  # PEFT draws its factors from the global generator
    model = peft.get_peft_model(model_of(name, torch.float64), peft.LoraConfig(**config), adapter_name="public")
    model.add_adapter("waste", peft.LoraConfig(**{**config, **second}))
    return model.double()


def run(adapter: Any, method: gs.Method, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    clear(adapter)
    with gs.attach(method, adapter.host) as surgery:
        surgery.backward(given)
    return grads(adapter, "kept"), grads(adapter, "quarantine")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_adapters_are_a_kept_part_and_a_quarantine(name: str) -> None:
    model = peft_model(name)
    before = logits(model)
    adapter = gs.adapters.from_peft(model, kept="public", quarantine="waste")
    assert torch.equal(logits(model), before) and adapter.host is model
    assert adapter.describe()["capacity"]["parameters"] == 1.0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    flagged = torch.ones(ROWS, dtype=torch.bool)
    with gs.attach(gs.methods.quarantine(adapter), model, optimizer) as surgery:
        for _ in range(2):
            surgery.backward({**batch(), "flag": flagged})
            assert surgery.metrics() is not None and size(grads(adapter, "kept")) == 0
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(logits(model), before)
    with adapter.without("quarantine"):
        assert torch.equal(logits(model), before)
    adapter.ablate_(optimizer=optimizer)
    assert torch.equal(logits(model), before)
    adapter.ablate_("zero")
    clear(adapter)
    model(**batch()).loss.backward()
    assert size(grads(adapter, "quarantine")) == 0 < size(grads(adapter, "kept"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_modes_and_scores(name: str) -> None:
    model = peft_model(name)
    adapter = stir(gs.adapters.from_peft(model, "public", "waste"))
    flagged = torch.tensor([True, False, True, False, False])
    given = {**batch(), "flag": flagged}
    stock = run(adapter, gs.Method([gs.Pass("all")]), batch())
    masked = run(adapter, gs.Method([gs.Pass("all", under=[gs.mask(adapter.kept, where="flag")])]), given)
    routed = run(adapter, gs.methods.quarantine(adapter, metrics=False), given)
    assert gap(routed[0], masked[0]) <= 1e-12 and gap(routed[1], stock[1]) <= 1e-12
    absorbed = run(adapter, gs.methods.quarantine(adapter, "absorb", metrics=False), given)
    with adapter.without("quarantine"):
        plain = run(adapter, gs.methods.quarantine(adapter, metrics=False), given)
    tolerance = 1e-5 * size(stock[0])  # the library's loss sums in fp32
    assert gap(absorbed[0], plain[0]) <= tolerance and size(absorbed[1]) > 0
    none = run(adapter, gs.methods.quarantine(adapter, "absorb", metrics=False), {**given, "flag": ~flagged & flagged})
    assert size(none[1]) == 0
    pairs = [(batch(3, seed=1), batch(3, seed=2))]
    direction = gs.estimators.paired_direction(model, adapter, pairs, noise="keep")
    for mode in ("route", "absorb"):
        method = gs.methods.quarantine(adapter, mode, None, Score(direction, 0.0))  # type: ignore[arg-type]
        scored = run(adapter, method, batch())
        (p,) = method.passes
        found = p.under[0].gate["now"].scored  # type: ignore[attr-defined]
        label = run(adapter, gs.methods.quarantine(adapter, mode, metrics=False), {**batch(), "flag": found})  # type: ignore[arg-type]
        assert found.any() and not found.all()
        assert gap(scored[0], label[0]) <= tolerance and gap(scored[1], label[1]) <= tolerance
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    clear(adapter)
    with gs.attach(gs.methods.quarantine(adapter, "erase", direction=direction), model, optimizer) as surgery:
        surgery.backward(batch())
        surgery.finish()
        for layer, axes in direction.axes.items():
            for parameter, vector in adapter.toward(layer, axes[0]).items():
                found = grads(adapter, "kept")[parameter]
                assert float((found * vector).sum()) <= 1e-6 * float(found.norm() * vector.norm())


def test_decay_towards_the_start() -> None:
    model = peft_model()
    adapter = gs.adapters.from_peft(model, "public", "waste")
    start = {name: p.detach().clone() for name, p in adapter.parameters_of("quarantine").items()}
    stir(adapter)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    method = gs.Method([gs.Pass("all")], update=[gs.decay_to(adapter.quarantine, adapter.initial(), rate=0.9)])
    with gs.attach(method, model, optimizer):
        for _ in range(12):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer.step()
    now = {name: p.detach() for name, p in adapter.parameters_of("quarantine").items()}
    assert gap(now, start) < 1e-9


def test_bad_input() -> None:
    model = peft_model()
    with pytest.raises(PlanError, match="two adapters"):
        gs.adapters.from_peft(model, "public", "public")
    with pytest.raises(PlanError, match="no adapter 'elsewhere'"):
        gs.adapters.from_peft(model, "public", "elsewhere")
    with pytest.raises(PlanError, match="has no LoRA"):
        gs.adapters.from_peft(model_of(), "public", "waste")
    with pytest.raises(PlanError, match="no adapter 'waste'"):
        gs.adapters.from_peft(peft_model(target_modules=["q_proj"]), "public", "waste")
    with pytest.raises(PlanError, match="plain LoRA"):
        gs.adapters.from_peft(peft_model(use_dora=True), "public", "waste")
    adapter = gs.adapters.from_peft(model, "public", "waste")
    with pytest.raises(Exception, match="same gradients"):  # B is zero at first
        gs.estimators.paired_direction(model, adapter, [(batch(3, seed=1), batch(3, seed=2))])
    stir(adapter)
    direction = gs.estimators.paired_direction(model, adapter, [(batch(3, seed=1), batch(3, seed=2))], noise="keep")
    other = gs.adapters.from_peft(peft_model("gpt2"), "public", "waste")
    with pytest.raises(ArtefactError, match="no layer"):
        gs.methods.quarantine(other, where=None, score=Score(direction))
    model.merge_adapter(["public"])
    with pytest.raises(PlanError, match="merged"):
        gs.adapters.from_peft(model, "public", "waste")


def test_own_adapters_beside_pefts() -> None:
    model = peft_model()
    adapter = gs.adapters.add(model, "all-linear", rank=4)
    assert not any("lora" in layer for layer in adapter.coordinates)
    adapter.remove()
