"""What every rank runs that is about ranks which differ in their method or rows, and about forwards without a backward.

Run by `tests.engines.equality_ranks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import gradsurgery as gs
from gradsurgery.errors import GradsurgeryError, PlanError
from tests.engines.equality import Weights
from tests.engines.methods import CASES, STEPS, batches, optimizer_of, share
from tests.engines.ranks import full, host_of
from tests.keys.tiers import double, key_of, keys_of
from tests.surgery.tiny import anatomy, batch, cut, gap, sgtm

m = gs.methods
DIFFER: dict[str, Callable[[int], gs.Method]] = {
    "nothing": lambda rank: m.tiered(key_of("llama"), anatomy()),
    "key": lambda rank: m.tiered(key_of("llama", seed=rank), anatomy()),
    "strategy": lambda rank: sgtm("llama", ("mask", "zero")[rank]),
    "rate of the keyed pass": lambda rank: m.tiered(key_of("llama"), anatomy(), every=1 + rank),
    "seed of the sampled tier": lambda rank: m.tiered(keys_of("llama", 2), anatomy(), tiers="sampled", seed=rank),
    "seed of the order": lambda rank: m.pcgrad({"a": "forget", "b": "retain"}, seed=rank),
    "norm": lambda rank: gs.Method([gs.Pass("p")], gradient=[gs.clip(1.0 + rank)]),
    "frozen part": lambda rank: gs.Method([gs.Pass("p")], update=[gs.freeze(anatomy().neurons[:, : 2 + rank])]),
    "slots": lambda rank: gs.Method([gs.Pass("p", into=("main", "other")[rank])]),
}
"""Methods that differ between two ranks, by what does."""


def disagreement(what: str, host: str) -> str:
    """What attach and the first backward say, and whether anything has moved."""
    model = double("llama")
    wrapped, before = host_of(model, host), full(model)
    optimizer = optimizer_of(model)
    with gs.attach(DIFFER[what](dist.get_rank()), wrapped, optimizer) as surgery:
        try:
            surgery.backward(batch(4))
        except PlanError as error:
            assert gap(full(model), before) == 0.0 and all(p.grad is None for p in model.parameters())
            return str(error)
    return "agreed"


def resumed_apart(host: str) -> str:
    """One rank takes a state of another step."""
    model = double("llama")
    wrapped, optimizer = host_of(model, host), optimizer_of(model)
    with gs.attach(m.plain(), wrapped, optimizer) as surgery:
        surgery.load_state_dict({**surgery.state_dict(), "step": 5 * dist.get_rank()})
        try:
            surgery.backward(batch(4))
        except PlanError as error:
            return str(error)
    return "agreed"


def uneven(name: str, host: str) -> float:
    """Five rows on one rank and three on the other, once all on one; against all of them in one process."""
    found: list[Weights] = []
    for place in ("one", host):
        model, method = CASES[name].start()
        wrapped, optimizer = host_of(model, place), optimizer_of(model)
        with gs.attach(method, wrapped, optimizer) as surgery:
            for step, whole in enumerate(batches(method)):
                cuts = ((0, 8), (8, 8)) if step == 1 else ((0, 5), (5, 8))
                mine = whole if place == "one" else rows(whole, *cuts[dist.get_rank()])
                surgery.backward(mine, num_items=surgery.count_items([mine], average=place != "one"))
                optimizer.step()
                optimizer.zero_grad()
        found.append(full(model))
    return gap(*found)


def rows(whole: Any, start: int, stop: int) -> Any:
    streams = {name: cut(value, start, stop) for name, value in whole.items() if isinstance(value, dict)}
    return {**cut({n: v for n, v in whole.items() if n not in streams}, start, stop), **streams}


def interrupted(name: str, host: str) -> dict[str, float]:
    """A forward without a backward, between two others: nothing changes, though FSDP2 leaves weights gathered."""
    plain = with_a_forward(name, host, "nowhere")
    return {
        where: gap(plain, with_a_forward(name, host, where)) for where in ("failed", "before backward", "before step")
    }


def with_a_forward(name: str, host: str, where: str) -> Weights:
    model, method = CASES[name].start()
    wrapped, optimizer = host_of(model, host), optimizer_of(model)
    with gs.attach(method, wrapped, optimizer) as surgery:
        for whole in batches(method):
            mine = share(whole, dist.get_rank(), 2)
            items = surgery.count_items([mine])
            if where == "failed":
                run_out_of_memory(surgery, mine)
                optimizer.zero_grad()
            if where == "before backward":
                evaluate(wrapped)
            surgery.backward(mine, num_items=items)
            if where == "before step":
                evaluate(wrapped)
            optimizer.step()
            optimizer.zero_grad()
        assert surgery.step == STEPS
    return full(model)


def one_fails(host: str, where: str) -> str:
    """One rank's batch cannot be read, or its loss is none, in C2: all say so, and the next step is as ever."""
    found: list[Weights] = []
    said = ""
    for fails in (False, True):
        model, method = CASES["tiered"].start()
        failing: list[bool] = []
        passes = [dataclasses.replace(p, loss=Failing(p.name == "C2", failing)) for p in method.passes]
        wrapped, optimizer = host_of(model, host), optimizer_of(model)
        with gs.attach(gs.Method(passes, method.gradient, method.update), wrapped, optimizer) as surgery:
            for step, whole in enumerate(batches(method)):
                mine = share(whole, dist.get_rank(), 2)
                if fails and step == 1:
                    broken = dist.get_rank() == 1
                    failing += [True] * (broken and where == "loss")
                    mine = {} if broken and where == "batch" else mine
                    try:
                        surgery.backward(mine)
                    except (GradsurgeryError, ArithmeticError) as error:
                        said = str(error)
                    failing.clear()
                    optimizer.zero_grad()
                    mine = share(whole, dist.get_rank(), 2)
                surgery.backward(mine)
                optimizer.step()
                optimizer.zero_grad()
        found.append(full(model))
    assert gap(*found) == 0.0
    return said


def basis_kept(name: str) -> dict[str, float]:
    """How many numbers of bases a rank keeps for its shards after a step, and how many the whole bases have."""
    model, method = CASES[name].start()
    wrapped, optimizer = host_of(model, "fsdp2"), optimizer_of(model)
    with gs.attach(method, wrapped, optimizer) as surgery:
        surgery.backward(batch(4))
        optimizer.step()
        (update,) = (state for state in surgery._stepper.states if "weights" in state)
        weights = update["weights"]
        kept = sum(part.numel() for part in weights.vectors.values())
        keys = {weights.coordinates.basis.site(name).key for name in weights._planned}
        whole = [weights.coordinates.basis.vectors[key] for key in keys]
    return {"kept": kept, "whole": sum(vectors.numel() for vectors in whole if vectors is not None)}


class Failing:
    """A loss that fails in one pass while it is asked to."""

    def __init__(self, here: bool, asked: list[bool]) -> None:
        self.here, self.asked = here, asked

    def __call__(self, outputs: Any, rows: Any, refs: Any) -> torch.Tensor:
        if self.here and self.asked:
            raise ArithmeticError("no loss on this rank")
        return gs.losses.causal_lm(outputs, rows, refs)


def evaluate(wrapped: Any) -> None:
    with torch.no_grad():
        wrapped(input_ids=batch(2)["input_ids"], use_cache=False)


def run_out_of_memory(surgery: gs.Surgery, given: Any) -> None:
    """In the middle of the last pass, on all ranks."""

    def burst(*_: Any) -> None:
        raise torch.OutOfMemoryError("simulated")

    head: Any = surgery.base.get_submodule("lm_head")
    handle = head.register_forward_pre_hook(burst)
    with contextlib.suppress(torch.OutOfMemoryError):
        surgery.backward(given)
        raise AssertionError("nothing failed")
    handle.remove()


def hazards(names: Sequence[str]) -> dict[str, Any]:
    """What both ranks found, by host."""
    results: dict[str, Any] = {}
    for host in ("ddp", "fsdp2"):
        results[host] = {
            "differ": {what: disagreement(what, host) for what in DIFFER},
            "resumed": resumed_apart(host),
            "uneven": {name: uneven(name, host) for name in names},
            "bases": {name: basis_kept(name) for name in ("warp", "actsvd")} if host == "fsdp2" else {},
            "one fails": {where: one_fails(host, where) for where in ("loss", "batch")},
            "interrupted": {name: interrupted(name, host) for name in names},
        }
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, results)
    return {str(rank): found for rank, found in enumerate(everywhere)}
