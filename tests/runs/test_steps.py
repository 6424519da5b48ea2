"""Steps of one or several streams: every row once and in order, however many ranks and micro-batches share a step."""

from __future__ import annotations

import pytest
import torch

import gradsurgery as gs
from gradsurgery.data import MixedSampler, Rows
from gradsurgery.errors import PlanError
from gradsurgery.runs import OrderedRows, OrderedStreams
from gradsurgery.runs.steps import rows_a_rank, tokens_a_step
from tests.surgery.tiny import build


def rows(count: int, start: int = 0, flagged: int = 0) -> Rows:
    ids = (torch.arange(start, start + count)[:, None] * 10 + torch.arange(7)).int()
    out = Rows.uniform(ids, "text", forget=False, retain=False, categories=("text",))
    out.forget[:flagged] = True
    return out


def ordered(per_batch: int, steps: int = 4, **options: int) -> OrderedRows:
    held = rows(12, **options)
    return OrderedRows(held, MixedSampler(held, per_batch, seed=1), steps)


@pytest.mark.parametrize("sizes", [(4, 2), (2, 6), (3, 3), (3, 2)], ids=str)
def test_items_of_a_step_hold_the_rows_of_each_streams_batch(sizes: tuple[int, int]) -> None:
    streams = {name: ordered(size, start=100 * k) for k, (name, size) in enumerate(zip("ab", sizes, strict=True))}
    both = OrderedStreams(streams)
    assert len(both) == 4 * both.size
    for step in range(4):
        batch = both.collate([both[step * both.size + k] for k in range(both.size)])
        for name, stream in streams.items():
            wanted = stream.collate([stream[step * stream.size + k] for k in range(stream.size)])
            assert torch.equal(batch[name]["input_ids"], wanted["input_ids"])
    with pytest.raises(IndexError):
        both[len(both)]


def test_the_batch_itself_may_have_streams_beside_it() -> None:
    main, beside = ordered(4), ordered(2, start=100)
    both = OrderedStreams({None: main, "beside": beside})
    items = [both[k] for k in range(both.size)]
    batch, wanted = both.collate(items), main.collate([main[k] for k in range(4)])
    assert set(batch) == {*wanted, "beside"} and torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["beside"]["input_ids"], beside.collate([beside[0], beside[1]])["input_ids"])
    method = gs.Method([gs.Pass("main"), gs.Pass("other", stream="beside")])
    assert tokens_a_step(method, both) == (28 + 14, 0)


def test_tokens_count_every_pass_that_runs_and_references_apart() -> None:
    model = build()
    anatomy = gs.dissect(model)
    key = gs.PermutationKey.generate(anatomy, fraction=0.3, attention_ratio=0, seed=0)
    data = ordered(4)
    assert tokens_a_step(gs.methods.plain(), data) == (28, 0)
    assert tokens_a_step(gs.methods.tiered(key, anatomy), data) == (56, 0)
    assert tokens_a_step(gs.methods.tiered(key, anatomy, every=2), data) == (42, 0)
    streams = OrderedStreams({"private": data, "public": ordered(2)})
    tuned = gs.methods.private_finetune(key, anatomy)
    assert tokens_a_step(tuned, streams) == (28 + 14, 14)
    decoys = gs.methods.private_finetune(key, anatomy, kl_weight=0.0, decoys=3)
    assert tokens_a_step(decoys, streams) == (28 + 28, 28)
    with pytest.raises(PlanError, match="'public'"):
        tokens_a_step(tuned, OrderedStreams({"private": data}))


def test_passes_over_some_rows_count_those() -> None:
    data = ordered(12, steps=1, flagged=3)
    only = gs.Method([gs.Pass("some", rows="forget"), gs.Pass("others", rows="~forget")])
    trained, _ = tokens_a_step(only, data)
    assert trained == pytest.approx(12 * 7)
    assert tokens_a_step(gs.methods.data_filter(), data)[0] == pytest.approx(9 * 7)


def test_a_step_that_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rows_a_rank(8, 2) == 2
    with pytest.raises(PlanError, match="multiple of 4"):
        rows_a_rank(6, 2)
