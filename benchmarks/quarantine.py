"""One step of an adapter with a quarantine, routed by labels and by scores, against the same adapter without routing.

GPT-Neo, 8 layers, width 384, vocabulary 8,192, 4 x 256 tokens; ranks 16 and 16 on every linear layer, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import gradsurgery as gs
from benchmarks import steps

Run = Callable[[], None]
FLAGGED = {"half of the rows": [1, 0, 1, 0], "no row": [0, 0, 0, 0], "every row": [1, 1, 1, 1]}


def build(device: str) -> tuple[Any, torch.optim.Optimizer, torch.Tensor]:
    """An adapter whose parts have both learned something, its optimizer, and token ids."""
    model, _, ids = steps.build(device)
    adapter = gs.adapters.add(model, "all-linear", rank=16)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.01 * torch.randn_like(parameter))
    return adapter, torch.optim.AdamW(trained, lr=1e-5), ids


def unrouted(device: str) -> Run:
    """What a user writes who trains the adapter on everything."""
    adapter, optimizer, ids = build(device)

    def step() -> None:
        adapter.host(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def routed(device: str, make: Callable[[Any], gs.Method], flagged: list[int]) -> Run:
    adapter, optimizer, ids = build(device)
    surgery = gs.attach(make(adapter), adapter.host, optimizer)
    batch = {"input_ids": ids, "labels": ids, "flag": torch.tensor(flagged, device=device).bool()}

    def step() -> None:
        surgery.backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def labelled(adapter: Any, mode: Any) -> gs.Method:
    return gs.methods.quarantine(adapter, mode)


def scored(adapter: Any, mode: Any, by: Any = "sequence") -> gs.Method:
    """About half of the rows are above the threshold."""
    ids = torch.randint(0, steps.VOCABULARY, (4, 64), device=next(adapter.parameters()).device)
    sides = [{"input_ids": side, "labels": side} for side in (ids[:2], ids[2:])]
    direction = gs.estimators.paired_direction(adapter.model, adapter, [(sides[0], sides[1])], noise="keep")
    score = gs.adapters.Score(direction, gs.adapters.Quantile(0.5, halflife=32), by=by)
    return gs.methods.quarantine(adapter, mode, where=None, score=score)


def candidates(device: str) -> tuple[Run, dict[str, Run]]:
    """The adapter's step without routing, and the steps to compare with it."""
    out: dict[str, Run] = {
        "unrouted against itself": unrouted(device),
        "surgery without routing": routed(device, lambda adapter: gs.methods.plain(), FLAGGED["no row"]),
    }
    for mode in ("route", "absorb"):
        for name, flagged in FLAGGED.items():
            out[f"{mode} by label, {name}"] = routed(device, partial(labelled, mode=mode), flagged)
    for mode in ("route", "absorb"):
        out[f"{mode} by score, sequence"] = routed(device, partial(scored, mode=mode), FLAGGED["no row"])
    out["route by score, token"] = routed(device, partial(scored, mode="route", by="token"), FLAGGED["no row"])
    return unrouted(device), out
