"""What a step needed is freed with the step, not when garbage is collected."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

import gradsurgery as gs
from tests.engines.methods import CASES, batches, optimizer_of

pytestmark = pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_slots_go_with_the_step(name: str) -> None:
    host, method = CASES[name].start()
    optimizer = optimizer_of(host)
    seen: dict[str, Any] = {}
    gc.collect()
    gc.disable()
    try:
        with gs.attach(method, host, optimizer) as surgery:
            for data in batches(method):
                surgery.backward(data)
                grads = {n: p.grad for n, p in host.named_parameters() if p.grad is not None}
                slots = {
                    f"{s}/{n}": g for s in surgery.slots if s not in method.keep for n, g in surgery.slots[s].items()
                }
                seen |= {key: weakref.ref(tensor) for key, tensor in {**grads, **slots}.items()}
                del grads, slots
                optimizer.step()
                optimizer.zero_grad()
            assert seen
            assert [key for key, tensor in seen.items() if tensor() is not None] == []
    finally:
        gc.enable()
