"""Attaching leaves a model as it was; removing leaves nothing behind, also after an exception anywhere in a step."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import gradsurgery as gs
from gradsurgery.errors import PlanError
from gradsurgery.surgery.surgery import attached_to
from gradsurgery.transforms.engine import hooks as hooks_module
from tests.surgery.tiny import anatomy, batch, build, forget_of, gap, grads, sgtm, weights

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name]


def traces(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Everything of a model and its surroundings that a surgery might leave something in."""
    gc.collect()  # surgeries of models that are gone take their global hook with them
    out: dict[str, Any] = {"keys": list(model.state_dict()), "names": {n: id(p) for n, p in model.named_parameters()}}
    for path, module in model.named_modules():
        out[path] = (type(module), sorted(vars(module)), {n: id(p) for n, p in module._parameters.items()})
        out[path + "/hooks"] = [len(getattr(module, name)) for name in HOOKS]
        out[path + "/forward"] = module.__dict__.get("forward")
    out["global"] = len(_global_optimizer_pre_hooks)
    out["acting"] = len(hooks_module._acting)
    if optimizer is not None:
        out["optimizer"] = (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))
        out["zero_grad"] = optimizer.__dict__.get("zero_grad")
    return out


def method_of(kind: str, strategy: str = "mask") -> gs.Method:
    """Every kind of handler: SGTM's, and a label-free mask of norms, which swaps parameters."""
    method = sgtm(kind, strategy)
    (only,) = method.passes
    norms = gs.region(build(kind), "model.norm.weight" if kind == "llama" else "*ln_f*")
    return gs.Method([gs.Pass("p", under=[*only.under, gs.mask(norms)])], method.gradient, method.update)


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_while_attached_names_class_and_identity_stay_and_remove_leaves_nothing(kind: str) -> None:
    gc.collect()
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = traces(model, optimizer)
    with gs.attach(method_of(kind), model, optimizer) as surgery:
        during = traces(model, optimizer)
        assert during["keys"] == before["keys"]
        assert during["names"] == before["names"]
        assert all(during[path][0] is before[path][0] for path, _ in model.named_modules())
        surgery.backward(batch())
        optimizer.step()
        optimizer.zero_grad()
        assert traces(model, optimizer)["names"] == before["names"]
    optimizer.state.clear()
    assert traces(model, optimizer) == before
    before_removed = grads(model)
    model(input_ids=batch()["input_ids"])
    assert grads(model) == before_removed == {}


@pytest.mark.parametrize("where", ["forward", "inside a swapped module", "loss", "backward", "interrupt", "step"])
def test_an_exception_anywhere_leaves_nothing_after_remove_and_a_usable_surgery_before(where: str) -> None:
    kind, armed = "llama", [True]
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = traces(model, optimizer)
    kind_of = KeyboardInterrupt if where == "interrupt" else RuntimeError

    def burst(*_: Any) -> None:
        if armed[0]:
            raise kind_of("burst")

    def loss(outputs: Any, rows: Any, refs: Any) -> torch.Tensor:
        if where == "loss":
            burst()
        if where == "backward":
            outputs.logits.register_hook(burst)
        return gs.losses.causal_lm(outputs, rows, refs)

    plain = method_of(kind)
    (p,) = plain.passes
    method = gs.Method([gs.Pass("p", loss, under=p.under)], plain.gradient, plain.update)
    surgery = gs.attach(method, model, optimizer)
    target = {"forward": model.model.layers[1], "interrupt": model.model.layers[0].mlp.act_fn}.get(where)
    if where == "inside a swapped module":
        target = model.model.norm
    handle = target.register_forward_pre_hook(burst) if target is not None else None
    if where == "step":
        handle = optimizer.register_step_pre_hook(burst)

    def step() -> None:
        surgery.backward(batch())
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(kind_of, match="burst"):
        step()
    assert traces(model)["names"] == before["names"]
    assert traces(model)["acting"] == before["acting"]
    armed[0] = False
    optimizer.zero_grad()
    step()  # the surgery is usable
    fresh = build(kind)
    other = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    with gs.attach(plain, fresh, other) as again:
        again.backward(batch())
        other.step()
    assert gap(weights(model), weights(fresh)) == 0.0
    if handle is not None:
        handle.remove()
    surgery.remove()
    optimizer.state.clear()
    assert traces(model, optimizer) == before


def test_a_bound_optimizer_and_a_removed_surgery_are_garbage() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    surgery = gs.attach(sgtm(), model, optimizer)
    surgery.backward(batch())
    optimizer.step()
    surgery.remove()
    kept = weakref.ref(surgery)
    del surgery
    gc.collect()
    assert kept() is None


def test_attaching_twice_is_refused_and_possible_after_remove() -> None:
    model = build()
    surgery = gs.attach(sgtm(stages=False), model)
    with pytest.raises(PlanError, match="attached to this LlamaForCausalLM already"):
        gs.attach(sgtm(stages=False), model)
    surgery.remove()
    gs.attach(sgtm(stages=False), model).remove()


def test_a_removed_surgery_says_so() -> None:
    model = build()
    surgery = gs.attach(sgtm(stages=False), model)
    surgery.remove()
    for call in (lambda: surgery.backward(batch()), surgery.finish, lambda: surgery.running("train").__enter__()):
        with pytest.raises(PlanError, match="was removed"):
            call()


def test_nested_transforms_on_the_same_modules_are_refused_and_on_others_work() -> None:
    model, units = build(), forget_of()
    data = {k: v for k, v in batch().items() if k not in ("forget", "retain")}
    before = traces(model)
    with gs.applied(model, gs.mask(units)):
        with pytest.raises(PlanError, match="other transforms act on"), gs.applied(model, gs.zero(units)):
            raise AssertionError("not reached")
        model(**data, use_cache=False).loss.backward()
    nested = grads(model)
    model.zero_grad()
    with gs.applied(model, gs.mask(units)):
        model(**data, use_cache=False).loss.backward()
    assert gap(nested, grads(model)) == 0.0
    model.zero_grad()
    first, second = gs.region(model, "model.layers.0.*"), gs.region(model, "model.layers.1.*")
    with gs.applied(model, gs.mask(first)), gs.applied(model, gs.mask(second)):
        model(**data, use_cache=False).loss.backward()
    assert all(not g.any() for n, g in grads(model).items() if "layers" in n)
    model.zero_grad()
    assert traces(model) == before


def test_applied_works_beside_an_idle_surgery_and_not_inside_its_pass() -> None:
    model, units = build(), forget_of()
    data = batch()
    with gs.attach(sgtm(stages=False), model) as surgery:
        with gs.applied(model, gs.zero(units)), torch.no_grad():
            without = model(input_ids=data["input_ids"]).logits
        with pytest.raises(PlanError, match="other transforms act on"), gs.applied(model, gs.mask(units)):
            surgery.backward(data)
        surgery.backward(data)
    with gs.applied(model, gs.zero(units)), torch.no_grad():
        assert torch.equal(without, model(input_ids=data["input_ids"]).logits)


def test_running_switches_on_for_train_and_off_inside_for_reference() -> None:
    model = build()
    data = batch()
    inputs = {k: v for k, v in data.items() if k not in ("forget", "retain")}
    with gs.attach(sgtm(stages=False), model) as surgery:
        surgery.backward(data)
        expected = grads(model)
        model.zero_grad()
        with torch.no_grad():
            plain = model(**inputs).logits
        with surgery.running("train", data):
            out = model(**inputs, use_cache=False)
            with surgery.running("reference"), torch.no_grad():
                assert torch.equal(model(**inputs).logits, plain)
            assert not torch.equal(out.logits, plain)  # retain rows run without the forget units
            out.loss.backward()
        assert gap(grads(model), expected) < 1e-7
        with surgery.running("generate"), torch.no_grad():
            assert torch.equal(model(**inputs).logits, plain)
        for more in ({"rows": "forget"}, {"weight": 2.0}, {"into": "protect"}, {"loss": lambda *_: torch.zeros(())}):
            with (
                gs.attach(gs.Method([gs.Pass("p", **more)]), build()) as other,
                pytest.raises(PlanError, match="which a forward and backward of your own ignores"),
            ):
                other.running("train", data).__enter__()
        with pytest.raises(PlanError, match="running takes"):
            surgery.running("eval").__enter__()
        with pytest.raises(gs.errors.BatchError, match="label column 'forget'"):
            surgery.running("train", inputs).__enter__()


def test_disabled_is_the_stock_step() -> None:
    model, stock = build(), build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain = torch.optim.AdamW(stock.parameters(), lr=1e-2)
    data = batch()
    inputs = {k: v for k, v in data.items() if k not in ("forget", "retain")}
    with gs.attach(sgtm(), model, optimizer) as surgery:
        with surgery.disabled():
            surgery.backward(inputs)
            optimizer.step()
            optimizer.zero_grad()
        stock(**inputs, use_cache=False).loss.backward()
        plain.step()
        assert gap(weights(model), weights(stock)) < 1e-6
        surgery.backward(data)  # and back on
        frozen = anatomy().neurons[0, :4]
        before = weights(model)
        optimizer.step()
    for name, part in frozen.entries.items():
        assert torch.equal(before[name][part.mask()], model.get_parameter(name)[part.mask()])


def test_an_unbound_optimizer_raises_at_its_first_step_before_anything_moves() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    surgery = gs.attach(sgtm(), model)
    surgery.backward(batch())
    before = weights(model)
    with pytest.raises(PlanError, match="no optimizer is bound"):
        optimizer.step()
    assert gap(before, weights(model)) == 0.0
    other = build()
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    stranger.step()  # another model's optimizer is none of our business
    surgery.bind(optimizer)
    surgery.bind(optimizer)
    optimizer.step()
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="another optimizer"):
        second.step()
    with pytest.raises(PlanError, match="bound to another optimizer"):
        surgery.bind(second)
    with pytest.raises(PlanError, match="closure"):
        optimizer.step(lambda: 0.0)
    surgery.remove()
    second.step()


def test_bind_refuses_what_is_no_optimizer_of_the_model() -> None:
    model = build()
    with gs.attach(sgtm(), model) as surgery:
        with pytest.raises(PlanError, match="takes a torch optimizer"):
            surgery.bind(object())
        with pytest.raises(PlanError, match="no parameter of this model"):
            surgery.bind(torch.optim.SGD(build().parameters(), lr=0.1))
    with pytest.raises(PlanError, match="no parameter of this model"):
        gs.attach(sgtm(), model, torch.optim.SGD(build().parameters(), lr=0.1))
    gs.attach(sgtm(), model).remove()  # the refused attach left nothing


def test_dry_run_leaves_no_trace() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=batch()["input_ids"], labels=batch()["input_ids"]).loss.backward()
    before, held, state = (
        traces(model, optimizer),
        {n: p.grad for n, p in model.named_parameters()},
        torch.get_rng_state(),
    )
    kept = weights(model)
    found = sgtm().dry_run(model, batch())
    assert 0 < sum(found.moved.values()) < sum(found.total.values())
    assert traces(model, optimizer) == before
    assert all(held[n] is p.grad for n, p in model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert gap(kept, weights(model)) == 0.0
    with pytest.raises(gs.errors.BatchError):
        sgtm().dry_run(model, {"input_ids": batch()["input_ids"]})
    assert traces(model, optimizer) == before
    assert all(held[n] is p.grad for n, p in model.named_parameters())


def test_the_surgery_takes_wrappers_of_its_model_alone() -> None:
    model = build()
    with gs.attach(sgtm(stages=False), model) as surgery, pytest.raises(PlanError, match="wrapper around it"):
        surgery.model = build()


def test_a_surgery_whose_handle_is_dropped_stays_attached_and_dies_with_its_model() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    dropped = weakref.ref(gs.attach(sgtm(), model, optimizer))
    gc.collect()
    with pytest.raises(PlanError, match="attached to this LlamaForCausalLM already"):
        gs.attach(sgtm(), model, optimizer)
    twin = copy.deepcopy(model)
    assert attached_to(twin) is None
    surgery = dropped()
    assert surgery is not None
    surgery.remove()
    gs.attach(sgtm(), model)
    kept, hooks = weakref.ref(model), len(_global_optimizer_pre_hooks)
    del model, optimizer, surgery
    gc.collect()
    assert kept() is None
    assert len(_global_optimizer_pre_hooks) == hooks - 1


def test_zero_grad_that_somebody_wrapped_before_or_after_keeps_working() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[str] = []

    def noting(name: str, zero_grad: Any) -> Any:
        def noted() -> None:
            calls.append(name)
            zero_grad()

        return noted

    optimizer.__dict__["zero_grad"] = first = noting("before", optimizer.zero_grad)
    surgery = gs.attach(gs.methods.plain(), model, optimizer)
    optimizer.zero_grad()
    surgery.remove()
    assert optimizer.__dict__["zero_grad"] is first
    surgery = gs.attach(gs.methods.plain(), model, optimizer)
    optimizer.__dict__["zero_grad"] = noting("after", optimizer.zero_grad)
    surgery.remove()
    optimizer.zero_grad()
    assert calls == ["before", "after", "before"]


def test_dry_run_leaves_buffers_and_modes() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.still = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.still(self.norm(self.inner(x)))

    model = Normed()
    held = {name: value.clone() for name, value in model.named_buffers()}
    seen: list[bool] = []

    def reference(host: nn.Module, inputs: Any) -> torch.Tensor:
        seen.append(model.norm.training)
        return host(**inputs)

    def loss(outputs: torch.Tensor, rows: Any, refs: Any) -> torch.Tensor:
        seen.extend((model.norm.training, model.still.training))
        return (outputs - refs["x"]).square().mean()

    method = gs.Method([gs.Pass("p", loss, refs={"x": reference})])
    method.dry_run(model, {"x": torch.randn(4, 3)})
    assert seen == [False, True, False]  # a module that was in eval stays there
    assert all(torch.equal(held[name], value) for name, value in model.named_buffers())
    assert (model.training, model.norm.training, model.still.training) == (True, True, False)
