"""Tiered training: both ways to step equal the originals' procedure; tiers, schedules, weights; hosts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError
from tests.keys.cases import ARCHITECTURES, copy_of, slow_, tensors_of, traces
from tests.keys.tiers import (
    combine,
    double,
    key_of,
    keys_of,
    loss_of,
    mask_of,
    originals,
    tier_gradient,
    trained,
    windows,
)
from tests.surgery.tiny import anatomy, batch, build, gap, grads, weights
from tests.transforms.cases import assert_close, case, gradients

pytestmark = pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")
SMALL = 1e-10
"""Three float64 steps, in which gradients differ by the order of a few sums."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW no decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "Adam L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


class TestTheOriginals:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("step_in", ["C1", "C2"])
    def test_three_steps(self, name: str, step_in: Any) -> None:
        kind, make = "gpt_neo", OPTIMIZERS[name]
        key, wanted, found = key_of(kind), double(kind), double(kind)
        originals(wanted, kind, key, make(wanted.parameters()), windows())
        method = gs.methods.tiered(key, anatomy(kind), step_in=step_in)
        trained(method, found, make(found.parameters()), windows())
        assert gap(weights(found), weights(wanted)) < SMALL
        assert gap(weights(found), weights(double(kind))) > 1e-3

    @pytest.mark.parametrize("step_in", ["C1", "C2"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_grouped_queries(self, step_in: Any, tied: bool) -> None:
        key, wanted, found = key_of("llama"), *(double("llama", tie_word_embeddings=tied) for _ in range(2))
        key = key.for_any_model()
        originals(wanted, "llama", key, adamw(wanted), windows())
        method = gs.methods.tiered(key, gs.dissect(found), step_in=step_in)
        trained(method, found, adamw(found), windows())
        assert gap(weights(found), weights(wanted)) < SMALL

    @pytest.mark.parametrize("step_in", ["C1", "C2"])
    def test_accumulation(self, step_in: Any) -> None:
        """Micro-batches of unequal length add up to one batch, as they do for the stock model (float32 attention)."""
        stock, make = [double("gpt_neo") for _ in range(2)], OPTIMIZERS["SGD momentum"]
        for model, micro in zip(stock, (1, 4), strict=True):
            trained(gs.methods.plain(), model, make(model.parameters()), windows(micro=micro))
        key, wanted, found = key_of("gpt_neo"), double("gpt_neo"), double("gpt_neo")
        originals(wanted, "gpt_neo", key, make(wanted.parameters()), windows(micro=1))
        method = gs.methods.tiered(key, anatomy("gpt_neo"), step_in=step_in)
        trained(method, found, make(found.parameters()), windows(micro=4))
        assert gap(weights(found), weights(wanted)) <= 2 * gap(*map(weights, stock))

    @pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
    def test_factors_of_every_parameter(self, kind: str) -> None:
        """A public gradient is the mean of both tiers', of biases and of tied embeddings too; a keyed one is C2's."""
        key, model, data = key_of(kind), double(kind), batch(4)
        keyed = key.region(anatomy(kind))
        c1, c2 = (tier_gradient(model, kind, keys, lambda m: loss_of(m, data)) for keys in ([], [key]))
        with gs.attach(gs.methods.tiered(key, anatomy(kind)), model, adamw(model)) as surgery:
            losses = surgery.backward(data)
            found = grads(model)
        assert float(losses["C1"]) == pytest.approx(float(loss_of(model, data).detach()), rel=1e-6)
        for name in found:
            inside = mask_of(keyed, name)
            wanted = torch.where(inside, c2[name], (c1[name] + c2[name]) / 2)
            scale = max(float(c1[name].abs().max()), float(c2[name].abs().max()))
            assert float((found[name] - wanted).abs().max()) <= 1e-12 * scale, name
        assert gap(c1, c2) > 1e-3

    def test_clipping_sees_one_gradient(self) -> None:
        """The gradient stage runs in C1, on the gradients of all tiers."""
        key, one, other, data = key_of("gpt_neo"), double("gpt_neo"), double("gpt_neo"), windows()
        method = gs.methods.tiered(key, anatomy("gpt_neo"))
        clipped = [gs.Method(m.passes, [gs.clip(0.1)], m.update) for m in (method,)]
        clipped.append(
            gs.Method(method.passes, [gs.clip(0.1)], gs.methods.tiered(key, anatomy("gpt_neo"), step_in="C2").update)
        )
        for model, chosen in zip((one, other), clipped, strict=True):
            trained(chosen, model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), data)
        assert gap(weights(one), weights(other)) < SMALL


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_factors_on_every_architecture(name: str) -> None:
    """Masks, scales and keys meet every layout: gradients of both tiers by hand, mixed by region."""
    c, model = case(name), copy_of(name)
    key = gs.PermutationKey.generate(c.anatomy, fraction=0.4 if name == "mamba2" else 0.25, seed=1)
    keyed = key.region(c.anatomy)
    c1 = gradients(model, c.loss(model))
    with torch.no_grad():
        slow_(tensors_of(model), name, key)
    c2 = gradients(model, c.loss(model))
    slow_(c2, name, key)
    with torch.no_grad():
        slow_(tensors_of(model), name, key)
    wanted = combine([(c1, [(~keyed, 0.5)]), (c2, [(~keyed, 0.5), (keyed, 1.0)])])

    def loss(outputs: Any, given: Any, refs: Any) -> Tensor:
        return c.loss(lambda **_: {"logits": outputs["logits"]})  # type: ignore[arg-type]

    with gs.attach(gs.methods.tiered(key, c.anatomy, loss=loss), model) as surgery:
        surgery.backward({k: v for k, v in c.batch.items() if k != "use_cache"})
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_close(found, wanted, c1)


class TestSchedules:
    def test_every_third_step(self) -> None:
        """In between, keyed entries stand still to the bit, and public ones learn from C1 alone."""
        kind, steps = "gpt_neo", windows(7)
        key, model = key_of(kind), double(kind)
        keyed = key.region(anatomy(kind))
        optimizer = adamw(model)
        with gs.attach(gs.methods.tiered(key, anatomy(kind), every=3), model, optimizer) as surgery:
            for k, (data,) in enumerate(steps):
                before = weights(model)
                wanted = tier_gradient(model, kind, [], lambda m, d=data: loss_of(m, d))  # type: ignore[misc]
                losses = surgery.backward(data)
                found = grads(model)
                optimizer.step()
                optimizer.zero_grad()
                assert set(losses) == ({"C1", "C2"} if k % 3 == 0 else {"C1"})
                moved = False
                for name, p in model.named_parameters():
                    inside = mask_of(keyed, name)
                    if k % 3:
                        assert torch.equal(p[inside], before[name][inside])
                        outside = found[name][~inside] - wanted[name][~inside]
                        assert not outside.numel() or float(outside.abs().max()) < 1e-12
                    moved |= not torch.equal(p[inside], before[name][inside])
                assert moved == (k % 3 == 0)

    def test_every_second_step_in_c2(self) -> None:
        key, models = key_of("gpt_neo"), [double("gpt_neo") for _ in range(2)]
        for model, where in zip(models, ("C1", "C2"), strict=True):
            method = gs.methods.tiered(key, anatomy("gpt_neo"), every=2, step_in=where)  # type: ignore[arg-type]
            trained(method, model, adamw(model), windows(5))
        assert gap(*map(weights, models)) < SMALL

    @pytest.mark.parametrize("tiers", ["sampled", "round_robin"])
    @pytest.mark.parametrize("cumulative", [False, True])
    def test_one_tier_a_step(self, tiers: Any, cumulative: bool) -> None:
        kind, keys, model = "gpt_neo", keys_of("gpt_neo", 3), double("gpt_neo")
        regions = [key.region(anatomy(kind)) for key in keys]
        public = ~(regions[0] | regions[1] | regions[2])
        method = gs.methods.tiered(keys, anatomy(kind), tiers=tiers, cumulative=cumulative, seed=3)
        optimizer, ran = adamw(model), []
        with gs.attach(method, model, optimizer) as surgery:
            for (data,) in windows(6):
                before = weights(model)
                losses = surgery.backward(data)
                (name,) = set(losses) - {"C1"}
                tier = int(name[1:]) - 2
                ran.append(tier)
                active = range(tier + 1) if cumulative else [tier]
                with torch.enable_grad():
                    keep = {n: p.grad for n, p in model.named_parameters()}
                    c1 = tier_gradient(model, kind, [], lambda m, d=data: loss_of(m, d))  # type: ignore[misc]
                    ck = tier_gradient(model, kind, [keys[i] for i in active], lambda m, d=data: loss_of(m, d))  # type: ignore[misc]
                wanted = combine([(c1, [(public, 0.5)]), (ck, [(public, 0.5), *((regions[i], 1.0) for i in active)])])
                assert gap({n: g for n, g in keep.items() if g is not None}, wanted) < 1e-12
                optimizer.step()
                optimizer.zero_grad()
                for i, region in enumerate(regions):
                    still = all(
                        torch.equal(p[mask_of(region, n)], before[n][mask_of(region, n)])
                        for n, p in model.named_parameters()
                    )
                    assert still == (i not in active)
        assert ran == [0, 1, 2, 0, 1, 2] if tiers == "round_robin" else len(set(ran)) > 1

    @pytest.mark.parametrize("cumulative", [False, True])
    def test_all_tiers(self, cumulative: bool) -> None:
        kind, keys, model, data = "gpt_neo", keys_of("gpt_neo", 2), double("gpt_neo"), batch(4)
        one, two = (key.region(anatomy(kind)) for key in keys)
        public = ~(one | two)

        def tier(*active: gs.PermutationKey) -> dict[str, Tensor]:
            return tier_gradient(model, kind, active, lambda m: loss_of(m, data))

        c1, c2, c3 = tier(), tier(keys[0]), tier(*keys) if cumulative else tier(keys[1])
        share = [(public, 1 / 3)]
        inside = [(one, 0.5), (two, 1.0)] if cumulative else [(two, 1.0)]
        wanted = combine([(c1, share), (c2, [*share, (one, 0.5 if cumulative else 1.0)]), (c3, [*share, *inside])])
        with gs.attach(gs.methods.tiered(keys, anatomy(kind), cumulative=cumulative), model, adamw(model)) as surgery:
            assert set(surgery.backward(data)) == {"C1", "C2", "C3"}
            assert gap(grads(model), wanted) < 1e-12

    def test_weights_of_tiers(self) -> None:
        kind, keys, model, data = "gpt_neo", keys_of("gpt_neo", 2), double("gpt_neo"), batch(4)
        one, two = (key.region(anatomy(kind)) for key in keys)
        public = ~(one | two)
        parts = [tier_gradient(model, kind, active, lambda m: loss_of(m, data)) for active in ([], keys[:1], keys[1:])]
        factors = [[(public, 0.7)], [(public, 0.0), (one, 3.0)], [(public, 0.3), (two, 0.25)]]
        wanted = combine(list(zip(parts, factors, strict=True)))
        method = gs.methods.tiered(keys, anatomy(kind), public_weights=[0.7, 0.0, 0.3], keyed_weights=[3, 0.25])
        with gs.attach(method, model, adamw(model)) as surgery:
            surgery.backward(data)
            assert gap(grads(model), wanted) < 1e-12


class TestHosts:
    def gradient(self, model: Any, host: Any = None, around: Any = None, step_in: Any = "C1") -> dict[str, Tensor]:
        """Of two accumulated batches."""
        method = gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), step_in=step_in)
        with gs.attach(method, host or model, adamw(model)) as surgery:
            for k in range(2):
                with around() if around is not None else contextlib.nullcontext():
                    surgery.backward(batch(4, seed=k))
            return grads(model)

    def test_gradient_checkpointing(self) -> None:
        plain, model = double("gpt_neo"), double("gpt_neo")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert gap(self.gradient(model), self.gradient(plain)) < 1e-12

    def test_one_autocast_around_the_whole_backward(self) -> None:
        """Autocast keeps casts of weights as long as it lasts: no tier may run on those of the other."""
        kind, key = "gpt_neo", key_of("gpt_neo")
        keyed = key.region(anatomy(kind))

        def loss(data: dict[str, Tensor]) -> Any:  # of the same kernel: in bf16 another rounds otherwise
            def run(model: Any) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    outputs = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"], use_cache=False)
                    return 0.5 * gs.losses.causal_lm(outputs, data, {})

            return run

        model = build(kind)
        parts = []
        for k in range(2):
            data = batch(4, seed=k)
            c1, c2 = (tier_gradient(model, kind, keys, loss(data)) for keys in ([], [key]))
            parts += [(c1, [(~keyed, 1.0)]), (c2, [(~keyed, 1.0), (keyed, 2.0)])]
        wanted = combine(parts)
        found = self.gradient(model, around=lambda: torch.autocast("cpu", torch.bfloat16))
        assert gap(found, wanted) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert gap(self.gradient(build(kind)), found) == 0.0

    def test_stepping_inside_autocast(self) -> None:
        """The next step's forward sees the stepped weights."""
        models = [build("gpt_neo") for _ in range(3)]
        method = gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"))
        for model, step_in in zip(models, ("C1", "C1", "C2"), strict=True):
            method = gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), step_in=step_in)  # type: ignore[arg-type]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            with gs.attach(method, model, optimizer) as surgery, contextlib.ExitStack() as stack:
                if model is not models[0]:
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                for k in range(3):
                    with torch.autocast("cpu", torch.bfloat16):
                        surgery.backward(batch(4, seed=k))
                    optimizer.step()
                    optimizer.zero_grad()
        assert gap(weights(models[0]), weights(models[1])) == 0.0
        assert gap(weights(models[0]), weights(models[2])) < 1e-6

    def test_bfloat16_weights(self) -> None:
        """Swaps are exact; both ways to step see the same bits."""
        models = [build("gpt_neo").to(torch.bfloat16) for _ in range(2)]
        for model, step_in in zip(models, ("C1", "C2"), strict=True):
            method = gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), step_in=step_in)  # type: ignore[arg-type]
            trained(method, model, adamw(model), windows())
        assert gap(*map(weights, models)) == 0.0

    @pytest.mark.parametrize("step_in", ["C1", "C2"])
    def test_frozen_parameters_stay_as_they_are(self, step_in: Any) -> None:
        """The neurons of all layers are frozen, heads train."""
        key, model = key_of("gpt_neo"), double("gpt_neo")
        frozen = [n for n, _ in model.named_parameters() if ".mlp." in n or "wpe" in n]
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        before = weights(model)
        method = gs.methods.tiered(key, anatomy("gpt_neo"), step_in=step_in)
        trained(method, model, adamw(model), windows())
        after = weights(model)
        assert all(torch.equal(before[n], after[n]) for n in frozen)
        assert all(not torch.equal(before[n], after[n]) for n in before if n not in frozen)

    def test_weights_that_train_in_one_tier_alone_are_refused(self) -> None:
        """Weight decay would get at them, or they would stand still half of the time."""
        key, model = key_of("gpt_neo"), double("gpt_neo")
        model.get_parameter("transformer.h.0.mlp.c_fc.weight").requires_grad_(False)
        with pytest.raises(PlanError, match=r"train in one tier and stand still in the other"):
            gs.attach(gs.methods.tiered(key, anatomy("gpt_neo")), model, adamw(model))

    def test_a_loop_of_ones_own(self) -> None:
        """Forward and backward by somebody else, inside of ``running``."""
        kind, key, model, data = "gpt_neo", key_of("gpt_neo"), double("gpt_neo"), batch(4)
        keyed = key.region(anatomy(kind))
        with gs.attach(gs.methods.tiered(key, anatomy(kind)), model, adamw(model)) as surgery:
            wanted = tier_gradient(model, kind, [key], lambda m: loss_of(m, data))
            with surgery.running("train", data, name="C2"):
                loss_of(model, data).backward()
            assert gap(grads(model), combine([(wanted, [(keyed, 1.0), (~keyed, 1.0)])])) < 1e-12
            with surgery.running("generate"):
                assert float(loss_of(model, data).detach()) == float(loss_of(double(kind), data).detach())

    def test_steps_without_the_method(self) -> None:
        """Disabled steps are plain ones in C1, wherever the moments lie."""
        found = []
        for step_in in ("C1", "C2"):
            model = double("gpt_neo")
            optimizer = adamw(model)
            method = gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), step_in=step_in)  # type: ignore[arg-type]
            with gs.attach(method, model, optimizer) as surgery:
                for k in range(4):
                    with surgery.disabled() if k % 2 else contextlib.nullcontext():
                        surgery.backward(batch(4, seed=k))
                        optimizer.step()
                        optimizer.zero_grad()
            found.append(weights(model))
        assert gap(*found) < SMALL

    def test_dry_runs(self) -> None:
        """Both tiers leave nothing behind, and reach what each reaches."""
        key, model = key_of("gpt_neo"), double("gpt_neo")
        method, before = gs.methods.tiered(key, anatomy("gpt_neo")), weights(model)
        dry = method.dry_run(model, batch(4))
        assert gap(weights(model), before) == 0.0 and not grads(model)
        keyed = key.region(anatomy("gpt_neo"))
        c2 = tier_gradient(model, "gpt_neo", [key], lambda m: loss_of(m, batch(4)))
        for name, mask in dry.masks.items():
            inside = mask_of(keyed, name)
            assert torch.equal(mask[inside], c2[name][inside] != 0)

    @pytest.mark.parametrize("step_in", ["C1", "C2"])
    def test_nothing_is_left_behind(self, step_in: Any) -> None:
        model = double("gpt_neo")
        optimizer = adamw(model)
        before, hooks = traces(model), {k: list(v) for k, v in vars(optimizer).items() if k.endswith("_hooks")}
        names, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
        method = gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), step_in=step_in)
        with gs.attach(method, model, optimizer) as surgery:
            surgery.backward(batch(4))
            assert type(model).__name__ == "GPTNeoForCausalLM" and list(model.state_dict()) == names
            assert [id(p) for p in model.parameters()] == ids
            optimizer.step()
            optimizer.zero_grad()
        assert traces(model) == before
        assert {k: list(v) for k, v in vars(optimizer).items() if k.endswith("_hooks")} == hooks
        assert "zero_grad" not in vars(optimizer)


class TestResume:
    @pytest.mark.parametrize("step_in", ["C1", "C2"])
    def test_surgery_and_optimizer_states(self, step_in: Any) -> None:
        """Two steps, a checkpoint, two more in other objects: equal to four."""
        key, whole, first = key_of("gpt_neo"), double("gpt_neo"), double("gpt_neo")
        method = gs.methods.tiered(key, anatomy("gpt_neo"), every=3, step_in=step_in)
        steps = windows(5)
        trained(method, whole, adamw(whole), steps)
        optimizer = adamw(first)
        with gs.attach(method, first, optimizer) as surgery:
            for (data,) in steps[:2]:
                surgery.backward(data)
                optimizer.step()
                optimizer.zero_grad()
            stored = copy.deepcopy(optimizer.state_dict())  # as a file: loading shares tensors, which removal turns
            state = first.state_dict(), stored, surgery.state_dict()
            second, other = double("gpt_neo"), None
            second.load_state_dict(state[0])
            other = adamw(second)
            other.load_state_dict(state[1])
        with gs.attach(method, second, other) as surgery:
            surgery.load_state_dict(state[2])
            for (data,) in steps[2:]:
                surgery.backward(data)
                other.step()
                other.zero_grad()
        assert gap(weights(second), weights(whole)) < SMALL

    def test_moments_of_c1_follow_into_c2_and_back(self) -> None:
        """Plain training, then tiered training that steps in C2, then plain training: as if all stepped in C1."""
        found = []
        for step_in in ("C1", "C2"):
            model = double("gpt_neo")
            optimizer = adamw(model)
            method = gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), step_in=step_in)  # type: ignore[arg-type]
            for one in (gs.methods.plain(), method, gs.methods.plain(), method):
                trained(one, model, optimizer, windows(2))
            found.append(weights(model))
        assert gap(*found) < SMALL


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 0}, "every is a positive number of steps"),
            ({"every": True}, "every is a positive number of steps"),
            ({"tiers": "some"}, "tiers is one of"),
            ({"tiers": "sampled"}, "give several keys"),
            ({"step_in": "C3"}, "step_in is one of"),
            ({"public_weights": [1.0]}, "one number a tier"),
            ({"keyed_weights": [1.0, 2.0]}, "one number a tier"),
        ],
    )
    def test_options(self, options: Any, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            gs.methods.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), **options)

    def test_keys(self) -> None:
        one, two = keys_of("gpt_neo", 2)
        with pytest.raises(PlanError, match="no one C2"):
            gs.methods.tiered([one, two], anatomy("gpt_neo"), step_in="C2")
        with pytest.raises(SelectionError, match="compose takes disjoint keys"):
            gs.methods.tiered([one, one], anatomy("gpt_neo"))
        with pytest.raises(PlanError, match=r"takes a gs.PermutationKey"):
            gs.methods.tiered([], anatomy("gpt_neo"))
        with pytest.raises(PlanError, match=r"takes a gs.PermutationKey"):
            gs.methods.tiered([anatomy("gpt_neo").heads[0, :1]], anatomy("gpt_neo"))  # type: ignore[list-item]

    def test_a_keyed_model_is_refused(self) -> None:
        model, key = double("gpt_neo"), key_of("gpt_neo")
        with gs.attach(gs.methods.tiered(key, anatomy("gpt_neo")), model, adamw(model)) as surgery:
            with key.applied(model), pytest.raises(gs.errors.KeyStateError, match="needs the model in C1"):
                surgery.backward(batch(4))
            assert set(surgery.backward(batch(4))) == {"C1", "C2"}

    def test_explain_and_describe_keep_the_secret(self) -> None:
        key, model = key_of("gpt_neo"), double("gpt_neo")
        method = gs.methods.tiered(key, anatomy("gpt_neo"), every=2, step_in="C2")
        with gs.attach(method, model, adamw(model)) as surgery:
            shown = [method.explain(model), str(method), repr(key), str(surgery.state_dict())]
        for text in shown:
            assert "[[" not in text and "((" not in text
        assert all(key.fingerprint in text for text in shown)
