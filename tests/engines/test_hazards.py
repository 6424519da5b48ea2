"""What goes wrong around a method is refused with its reason, or leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.keys.configuration import require_c1
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.stages import GradientTransform, StepContext
from tests.engines.hazard_ranks import DIFFER
from tests.engines.methods import CASES, batches, optimizer_of
from tests.engines.ranks import full
from tests.engines.test_equality import some
from tests.surgery.tiny import anatomy, batch, build, gap, sgtm, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("scope", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_ranks_that_differ_and_forwards_without_a_backward(scope: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(f"{scope}_ranks")["hazards"]
    for rank in ("0", "1"):
        for host in ("ddp", "fsdp2"):
            said = found[rank][host]["differ"]
            assert said["nothing"] == "agreed" and list(said) == list(DIFFER)
            for what in {*DIFFER} - {"nothing"}:
                assert said[what].startswith("the ranks disagree on"), (what, said[what])
            resumed = found[rank][host]["resumed"]
            assert "disagree on the optimizer step" in resumed and f"rank {rank}, is at step {5 * int(rank)}" in resumed
            for name, bases in found[rank][host]["bases"].items():  # the input side needs all, the output side a half
                assert bases["kept"] <= bases["whole"] * (0.5 if name == "actsvd" else 1.0), (name, bases)
            for where, text in (("loss", "no loss on this rank"), ("batch", "holds no tensor with rows")):
                assert text in found[rank][host]["one fails"][where]
                assert rank == "1" or "failed on rank 1" in found[rank][host]["one fails"][where]
            uneven, interrupted = found[rank][host]["uneven"], found[rank][host]["interrupted"]
            assert uneven.keys() == interrupted.keys() and len(uneven) > 1
            for name in uneven:
                assert uneven[name] <= 1e-12, (host, name, uneven[name])
                assert max(interrupted[name].values()) == 0.0, (host, name, interrupted[name])


FAILING = ["tiered", "private_finetune", "opposed", "gru", "quarantine, route by score", "sgtm, zero"]


class Fails:
    """Runs out of memory in one of the calls of a module: in its forward, or in the backward through its output."""

    def __init__(self, module: Any, call: int, backward: bool) -> None:
        self.calls, self.call, self.backward = 0, call, backward
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += torch.is_grad_enabled()
        if not torch.is_grad_enabled() or self.calls != self.call:
            return
        if not self.backward:
            raise torch.OutOfMemoryError("simulated")
        output.register_hook(self.burst)

    def burst(self, grad: Tensor) -> None:
        raise torch.OutOfMemoryError("simulated")


def head_of(host: Any) -> nn.Module:
    """What every forward calls once."""
    module: nn.Module = host.get_submodule("model.lm_head" if hasattr(host, "adapter") else "lm_head")
    return module


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", some(FAILING))
def test_out_of_memory_leaves_the_model_as_it_was(name: str, backward: bool) -> None:
    """Weights, configuration and hooks at once; gradients with the next ``zero_grad``, and then nothing tells."""
    found = []
    for call in (0, 1, 2):  # in no pass, in the first and in the second
        host, method = CASES[name].start()
        optimizer = optimizer_of(host)
        with gs.attach(method, host, optimizer) as surgery:
            for k, data in enumerate(batches(method)):
                if k == 1 and call:
                    before = full(host)
                    fails = Fails(head_of(host), call, backward)
                    try:
                        surgery.backward(data)
                    except torch.OutOfMemoryError:
                        assert surgery._board.plan is None
                    fails.handle.remove()
                    assert gap(full(host), before) == 0.0
                    require_c1(surgery.base, "a test")
                    optimizer.zero_grad()
                surgery.backward(data, num_items=surgery.count_items([data]))
                optimizer.step()
                optimizer.zero_grad()
        found.append(full(host))
    assert gap(found[0], found[1]) == gap(found[0], found[2]) == 0.0


def test_another_optimizer_than_the_bound_one_is_refused() -> None:
    model = build()
    first, second = optimizer_of(model), optimizer_of(model)
    methods = {
        "clip": gs.Method([gs.Pass("p")], gradient=[gs.clip(1.0)]),
        "freeze": gs.Method([gs.Pass("p")], update=[gs.freeze(anatomy().neurons[:, :2])]),
        "schedule": gs.Method([gs.Pass("p"), gs.Pass("q", when=gs.every(2))]),
    }
    for name, method in methods.items():
        with gs.attach(method, model, first) as surgery:
            surgery.backward(batch())
            before = weights(model)
            with pytest.raises(PlanError, match=f"{name}.*another optimizer"):
                second.step()
            assert gap(weights(model), before) == 0.0
            with pytest.raises(PlanError, match="bound to another optimizer"):
                surgery.bind(second)


class EverySecond(GradientTransform):
    """Measures something in some steps alone."""

    traits = Traits(linear=True)

    def apply(self, context: StepContext, state: dict[str, Any]) -> None:
        context.metrics |= {"seen": 1.0} if context.step % 2 == 0 else {}


def test_metrics_are_of_the_last_step_alone() -> None:
    model = build()
    optimizer = optimizer_of(model)
    with gs.attach(gs.Method([gs.Pass("p")], gradient=[EverySecond(), gs.clip(1.0)]), model, optimizer) as surgery:
        for step in range(4):
            surgery.backward(batch(seed=step))
            optimizer.step()
            optimizer.zero_grad()
            assert set(surgery.metrics()) == {"loss/p", "grad_norm"} | ({"seen"} if step % 2 == 0 else set())


def test_a_batch_without_rows_is_an_error_where_no_other_rank_has_some() -> None:
    empty = {name: value[:0] for name, value in batch().items()}
    with gs.attach(gs.methods.plain(), build()) as surgery, pytest.raises(BatchError, match="has no rows"):
        surgery.backward(empty)


def sharded_by_hand() -> Any:
    model = build()
    model.__class__ = type("Sharded", (type(model),), {"tp_size": property(lambda self: 2)})
    return model


def on_mps() -> Any:
    model = build()
    model.parameters = lambda *_, **__: iter([SimpleNamespace(device=torch.device("mps"))])
    return model


def by_deepspeed() -> Any:
    return type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()


HOSTS: dict[str, tuple[Callable[[], Any], str]] = {
    "tensor parallel": (sharded_by_hand, "tensor parallelism computes heads and neurons.*fully_shard"),
    "MPS": (on_mps, "MPS has no float64.*CPU"),
    "DeepSpeed": (by_deepspeed, "DeepSpeed steps its optimizer inside backward.*fully_shard"),
    "DataParallel": (lambda: nn.DataParallel(build()), "replicas in threads.*DDP"),
}


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_are_refused_at_attach(name: str) -> None:
    make, reason = HOSTS[name]
    host = make()
    with pytest.raises(PlanError, match=reason):
        gs.attach(sgtm(stages=False), host)


@pytest.mark.parametrize("module", ["accelerate.utils.deepspeed", "deepspeed.runtime.zero.stage_1_and_2"])
def test_deepspeeds_optimizers_are_refused(module: str) -> None:
    model = build()
    optimizer = type("DeepSpeedOptimizerWrapper", (torch.optim.SGD,), {"__module__": module})(
        model.parameters(), lr=0.1
    )
    with pytest.raises(PlanError, match="steps inside backward"):
        gs.attach(sgtm(), model, optimizer)


class TestEightBitOptimizers:
    """bitsandbytes' AdamW: moments in 8 bits, which follow no key."""

    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("bitsandbytes")

    def optimizer(self, model: nn.Module) -> Any:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.1, min_8bit_size=16)

    @pytest.mark.parametrize("name", ["sgtm, mask", "tiered", "warp", "opposed"])
    def test_methods_train(self, name: str) -> None:
        """As without surgery: the optimizer steps with what the method made of the gradient."""
        found = []
        for bound in (False, True):
            model, method = CASES[name].start(torch.float32)
            optimizer = self.optimizer(model)
            frozen = [t for t in method.update if isinstance(t, type(gs.freeze(anatomy().neurons)))]
            before = weights(model)
            with gs.attach(method, model, optimizer) as surgery:
                for data in batches(method):
                    surgery.backward(data)
                    if not bound:
                        surgery.finish()
                    optimizer.step()
                    optimizer.zero_grad()
            assert all(optimizer.state[p]["state1"].dtype == torch.uint8 for p in optimizer.state)
            for freeze in frozen:
                for entry, p in model.named_parameters():
                    held = freeze.region.of(entry).mask()
                    assert torch.equal(p[held], before[entry][held])
            assert gap(weights(model), before) > 1e-3
            found.append(weights(model))
        assert gap(*found) == 0.0

    def test_moments_that_stepped_in_c2_cannot_return(self) -> None:
        model, method = CASES["tiered, in C2"].start(torch.float32)
        optimizer = self.optimizer(model)
        surgery = gs.attach(method, model, optimizer)
        for data in batches(method):
            surgery.backward(data)
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(PlanError, match=r"uint8.*cannot follow swapped units.*use AdamW"):
            surgery.remove()
        require_c1(model, "a test")
        assert not surgery.attached and gs.attach(gs.methods.plain(), model).attached


def test_fp16_autocast_with_a_scaler_is_near_fp32() -> None:
    found = []
    for low in (False, True):
        model, method = CASES["opposed"].start(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=low)

        def backward(loss: Tensor, scaler: Any = scaler, **more: Any) -> None:
            scaler.scale(loss).backward(**more)

        with gs.attach(method, model, optimizer) as surgery:
            for data in batches(method):
                with torch.autocast("cpu", torch.float16, enabled=low):
                    surgery.backward(data, backward=backward)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            assert surgery.step == 3
        found.append(torch.cat([p.flatten() for p in weights(model).values()]))
    start = torch.cat([p.flatten() for p in weights(CASES["opposed"].start(torch.float32)[0]).values()])
    moved, near = found[0] - start, found[1] - start
    assert torch.cosine_similarity(moved, near, dim=0) > 0.99
