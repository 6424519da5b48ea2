"""The computed figures, against sums written out by hand for a Llama of 2 layers, width 4, 6 neurons, 2 heads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import gradsurgery as gs
from benchmarks import computed
from benchmarks.computed import GIB, TERA, Cluster, Facts
from benchmarks.models import llama

KEY = gs.PermutationKey(attn_heads=[[[0, 0], [1, 0]]], mlp_cols=[[[0, 0], [1, 5]], [[0, 1], [1, 0]]])
LAYER = {"q": 4 * 4, "k": 2 * 4, "v": 2 * 4, "o": 4 * 4, "gate": 6 * 4, "up": 6 * 4, "down": 4 * 6, "norms": 2 * 4}
P = 2 * sum(LAYER.values()) + 4 + 2 * 8 * 4  # two layers, the last norm, embedding and output
N = P - 8 * 4  # an embedding is looked up
HEAD, NEURON = 16 + 8 + 8 + 16, 3 * 4  # one KV group with both query heads; gate and up row, down column
KEYED = 2 * HEAD + 4 * NEURON
TOKENS, CONTEXT = 16, 8
FORWARD = TOKENS * (2 * N + 4 * 2 * 4 * CONTEXT)


@functools.cache
def facts() -> Facts:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(2, 4, 6, 2, 1, 2, vocabulary=8))
    return Facts.of("by hand", model, KEY)


def cluster(cards: int) -> Cluster:
    return Cluster(cards, TOKENS, CONTEXT)


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found == {name: pytest.approx(value, rel=1e-12) for name, value in expected.items()}


@pytest.mark.parametrize("cards", [1, 2, 3])
def test_stock_step(cards: int) -> None:
    assert facts().parameters == P
    expected = {
        "TFLOP": 3 * FORWARD / TERA,
        "between cards, GiB": 8 * P * (1 - 1 / cards) / GIB,
        "held, GiB": 16 * P / cards / GIB,
    }
    close(computed.stock(facts(), cluster(cards)), expected)


# neurons 0-2 lie on the first of two cards: 0 and 5 part, 1 and 0 do not; of three cards two neurons each, so do both
# keyed KV groups have rows in the same places of both layers
@pytest.mark.parametrize(("cards", "rows"), [(1, 0), (2, 1), (3, 1), (6, 2)])
def test_rows_that_cross(cards: int, rows: int) -> None:
    assert computed.crossing(facts().plan, facts().plan.anatomy.space.shapes, cards) == rows * 2 * (4 + 4)


def test_one_key() -> None:
    expected = {
        "swaps": 3,
        "entries, M": KEYED / 1e6,
        "read and written, GiB": 8 * KEYED / 2 / GIB,
        "between cards, GiB": 4 * 16 / 2 / GIB,
    }
    close(computed.key(facts(), cluster(2)), expected)


def test_tiered() -> None:
    expected = {
        "TFLOP": 3 * FORWARD / TERA,
        "passes between cards, GiB": 8 * P / 2 / GIB,
        "key between cards, GiB": 4 * 4 * 16 / 2 / GIB,
        "key read and written, GiB": 4 * 8 * KEYED / 2 / GIB,
        "held, GiB": 0.0,
    }
    close(computed.tiered(facts(), cluster(2)), expected)


def test_private_finetuning() -> None:
    partly = 2 * (sum(LAYER.values()) - LAYER["norms"]) - KEYED  # every matrix of the layers holds keyed entries
    expected = {
        "TFLOP": 4 * FORWARD / TERA,
        "passes between cards, GiB": 10 * P / 2 / GIB,
        "key between cards, GiB": 4 * 4 * 16 / 2 / GIB,
        "key, snapshot read and written, GiB": (4 * 8 * KEYED + 2 * 4 * 4 * KEYED) / 2 / GIB,
        "snapshot, GiB": 4 * KEYED / 2 / GIB,
        "freeze, in the step, GiB": 4 * partly / 2 / GIB,
    }
    close(computed.private(facts(), cluster(2)), expected)


def test_opposed() -> None:
    expected = {
        "TFLOP": 3 * FORWARD / TERA,
        "passes between cards, GiB": 8 * P / 2 / GIB,
        "slot, GiB": 4 * P / 2 / GIB,
        "snapshot, GiB": 4 * P / 2 / GIB,
        "read and written, GiB": (8 + 5) * 4 * P / 2 / GIB,
        "numbers reduced": 4 * (2 * 9 + 3),  # seven matrices and two norms a layer; norm, embedding, output
    }
    close(computed.opposed(facts(), cluster(2)), expected)


def test_rotation() -> None:
    gate, down = 4 * 6 * 4 * 4, 4 * 4 * 6 * 6  # two products of 2 FLOPs with [in, in]
    expected = {
        "TFLOP": 2 * (2 * gate + down) / 2 / TERA,
        "bases, GiB": 2 * (4 * 4 + 6 * 6) * 2 / GIB,
        "coordinates and masks, GiB": 2 * 3 * 24 * (0.4 + 1 / 8) / 2 / GIB,
    }
    close(computed.rotation(facts(), cluster(2)), expected)


def test_quarantine() -> None:
    ends = 2 * ((4 + 4) + 2 * (4 + 2) + (4 + 4) + 3 * (4 + 6))  # q; k and v; o; gate, up and down
    trained = 2 * computed.RANK * ends
    expected = {
        "trained, M": trained / 1e6,
        "model TFLOP": TOKENS * (4 * N + 12 * 2 * 4 * CONTEXT) / TERA,
        "adapter TFLOP": 10 * TOKENS * trained / TERA,
        "adapter in all, GiB": 20 * trained / GIB,
        "gradients of the stock step": trained / P,
    }
    close(computed.quarantine(facts(), cluster(2)), expected)


def test_an_adapter_has_the_parameters_that_are_counted() -> None:
    model = AutoModelForCausalLM.from_config(llama(2, 32, 48, 4, 2, 8, vocabulary=8))
    with torch.device("meta"):
        same = AutoModelForCausalLM.from_config(llama(2, 32, 48, 4, 2, 8, vocabulary=8))
    counted = computed.quarantine(Facts.of("small", same), cluster(1))["trained, M"]
    adapter = gs.adapters.add(model, "all-linear", rank=computed.RANK)
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == pytest.approx(1e6 * counted)


def test_checkpoints() -> None:
    close(computed.checkpoint(facts(), cluster(4)), {"all, GiB": 12 * P / GIB, "a card, GiB": 3 * P / GIB})


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_two_ranks_send_what_is_computed(tmp_path: Path) -> None:
    from tests.engines.test_ranks import launch
    from tests.keys.tiers import key_of
    from tests.surgery.tiny import anatomy

    results: dict[str, Any] = launch("tests.engines.traffic_ranks", directory=tmp_path)
    for kind in ("llama", "gpt_neo"):
        plan = key_of(kind).plan(anatomy(kind))
        entries = computed.crossing(plan, anatomy(kind).space.shapes, 2)
        for dtype in (torch.float32, torch.bfloat16):
            for what, times in (("weights", 1), ("weights and gradients", 2)):
                seen = results[f"key, {kind}, {dtype}, {what}"]["seen"]
                assert sum(size for rank in seen for _, _, size in rank) == entries * dtype.itemsize * times
    found = results["project, global"]
    for rank in found["seen"]:
        assert sum(numbers for _, numbers, _ in rank) == 4 * found["tensors"]
