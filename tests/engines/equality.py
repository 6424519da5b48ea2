"""Three steps of a method on an engine: the cells of the matrix of equality."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import gradsurgery as gs
from gradsurgery.errors import GradsurgeryError
from tests.engines.methods import CASES, batches, optimizer_of, share
from tests.engines.ranks import full
from tests.surgery.tiny import gap

Weights = dict[str, Tensor]
Cell = float | str
"""The largest difference of a weight from the plain loop's, or the sentence by which the method was refused."""

LOCAL = ("accumulation", "checkpointing", "bf16", "scaler", "fused", "foreach", "compile")
RANKS = ("ddp", "ddp, accumulation", "fsdp2", "fsdp2, accumulation")
TOLERANCE = {**dict.fromkeys((*LOCAL, *RANKS, "accelerate", "fabric", "trainer", "sft"), 1e-12), "bf16": 1e-6}
"""Double weights that moved by 3e-2, and AdamW may make much of rounding; under autocast they are single."""


def trained(
    name: str,
    wrap: Callable[[Any], Any] = lambda host: host,
    micro: int = 1,
    rank: int = 0,
    ranks: int = 1,
    around: Callable[[], Any] = contextlib.nullcontext,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Weights:
    """All weights after three AdamW steps in a plain loop.

    Args:
        wrap: Makes of the model what is called.
        micro: Micro-batches a step.
        rank, ranks: Whose rows are taken.
        around: Context of every backward.
        **options: Of the optimizer.
    """
    host, method = CASES[name].start(dtype)
    wrapped = wrap(host)
    optimizer = optimizer_of(host, **options)
    with gs.attach(method, wrapped, optimizer) as surgery:
        for whole in batches(method):
            mine = share(whole, rank, ranks)
            parts = [share(mine, k, micro) for k in range(micro)]
            items = surgery.count_items(parts, average=ranks > 1)
            for k, part in enumerate(parts):
                with around(), accumulating(wrapped, k + 1 < micro):
                    surgery.backward(part, num_items=items)
            optimizer.step()
            optimizer.zero_grad()
    return full(host)


@functools.cache
def alone(name: str) -> Weights:
    """The plain loop: one process, the whole batch."""
    return trained(name)


def accumulating(wrapped: Any, more: bool) -> Any:
    """What a host asks of DDP and FSDP2 when more micro-batches follow: not to reduce yet."""
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(not more)
    return wrapped.no_sync() if more and hasattr(wrapped, "no_sync") else contextlib.nullcontext()


def cell(engine: str, name: str) -> Cell:
    """One cell of the matrix, in this process."""
    run: Callable[[str], float] = globals()[engine]
    try:
        return run(name)
    except GradsurgeryError as error:
        return str(error)


def accumulation(name: str) -> float:
    """Two micro-batches a step."""
    return gap(alone(name), trained(name, micro=2))


def checkpointing(name: str) -> float:
    """Activations are dropped, and computed again inside the backward."""
    again = 0

    def on(host: Any) -> Any:
        def count(*_: Any) -> None:
            nonlocal again
            again += torch._C._current_graph_task_id() != -1  # a backward is under way

        block: Any = next(m for m in host.modules() if isinstance(m, torch.nn.ModuleList))[0]
        block.mlp.register_forward_pre_hook(count)
        host.gradient_checkpointing_enable({"use_reentrant": False})
        return host

    found = gap(alone(name), trained(name, on))
    assert again
    return found


def bf16(name: str) -> float:
    """Autocast around everything against autocast around the forward alone, as Accelerate has it; single weights."""

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def inside(host: Any) -> Any:
        forward = host.forward

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with autocast():
                return forward(*args, **kwargs)

        host.forward = wrapped
        return host

    everywhere = trained(name, around=autocast, dtype=torch.float32)
    assert gap(everywhere, trained(name, dtype=torch.float32)) > 1e-4  # it is autocast
    return gap(everywhere, trained(name, inside, dtype=torch.float32))


def scaler(name: str) -> float:
    """Losses times a power of two that a scaler takes out again; every step overflows once and is skipped."""
    host, method = CASES[name].start()
    optimizer, scale = optimizer_of(host), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)

    def backward(loss: Tensor, **more: Any) -> None:
        scale.scale(loss).backward(**more)

    with gs.attach(method, host, optimizer) as surgery:
        for k, whole in enumerate(batches(method)):
            for overflows in (True, False):
                surgery.backward(whole, num_items=surgery.count_items([whole]), backward=backward)
                if overflows:
                    held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                    held[-1].fill_(torch.inf)
                scale.step(optimizer)
                scale.update()
                optimizer.zero_grad()
            assert surgery.step == k + 1
    return gap(alone(name), full(host))


def fused(name: str) -> float:
    """AdamW's fused kernel, which steps and unscales in one."""
    return gap(alone(name), trained(name, fused=True))


def foreach(name: str) -> float:
    """AdamW over all parameters at once."""
    return gap(alone(name), trained(name, foreach=True))


def compile(name: str) -> float:
    """``torch.compile``, the backward too, in the eager kernels that the reference runs."""
    before = alone(name)
    with compiling():
        found = gap(before, trained(name, lambda host: torch.compile(host, backend="aot_eager")))
        assert counters["stats"]["unique_graphs"]
    return found


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """No graph of another test is met inside, none is left behind."""
    torch._dynamo.reset()
    counters.clear()
    try:
        yield
    finally:
        torch._dynamo.reset()


def on_ranks(
    directory: Path, names: Sequence[str], engines: Sequence[str] = RANKS, hazards: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Cells by engine and method of two processes that run them all, one after the other; with ``"hazards"`` last."""
    from tests.engines.test_ranks import launch

    given = {"engines": engines, "names": names, "hazards": hazards}
    (directory / "cells.json").write_text(json.dumps(given))
    found: dict[str, dict[str, Any]] = launch("tests.engines.equality_ranks", directory=directory, limit=1200)
    return found
