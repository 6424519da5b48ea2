from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gradsurgery.data import MixedBatches, MixedSampler, Rows, collate, drop_rows
from gradsurgery.errors import DataError

NAMES = ("en", "es")


def make_rows(english=10, spanish=4):
    ids = torch.arange((english + spanish) * 3, dtype=torch.int32).view(-1, 3)
    return Rows.cat(
        [
            Rows.uniform(ids[:english], "en", False, True, NAMES),
            Rows.uniform(ids[english:], "es", True, False, NAMES),
        ]
    )


def take(sampler, batches):
    return list(islice(sampler, batches))


def test_each_batch_has_its_rows_of_each_category():
    batches = MixedBatches(make_rows(), {"en": 3, "es": 2}, steps=7)
    seen = list(batches)
    assert len(seen) == len(batches) == 7
    for batch in seen:
        assert batch["category"].tolist() == [0, 0, 0, 1, 1]
        assert batch["forget"].tolist() == [False] * 3 + [True] * 2
        assert batch["retain"].tolist() == [True] * 3 + [False] * 2
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["forget"].dtype == torch.bool
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert "attention_mask" not in batch


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 3), st.integers(0, 5))
def test_each_epoch_of_each_category_has_every_row_once(english, spanish, e, s, seed):
    sampler = MixedSampler(make_rows(english, spanish), {"en": e, "es": s}, seed=seed)
    drawn = [i for batch in take(sampler, english) for i in batch if i < english]
    for epoch in range(e):
        assert sorted(drawn[epoch * english : (epoch + 1) * english]) == list(range(english))
    assert sampler.epochs() == {"en": e, "es": s * english / spanish}


@given(st.sampled_from([{"en": 3, "es": 2}, 4]), st.integers(0, 20), st.integers(0, 5))
def test_a_resumed_run_sees_the_same_batches(per_batch, done, seed):
    whole = take(MixedSampler(make_rows(), per_batch, seed=seed), done + 5)
    first = MixedSampler(make_rows(), per_batch, seed=seed)
    take(first, done)
    second = MixedSampler(make_rows(), per_batch, seed=seed)
    second.load_state_dict(first.state_dict())
    assert take(second, 5) == whole[done:]
    assert second.indices(done) == whole[done] if done < len(whole) else True


def test_epochs_and_seeds_differ():
    sampler = MixedSampler(make_rows(50, 4), {"en": 50}, seed=1)
    one, two = take(sampler, 2)
    assert sorted(one) == sorted(two) and one != two
    assert MixedSampler(make_rows(50, 4), {"en": 50}, seed=2).indices(0) != one


def test_upsampling_by_hand():
    """10 English rows at 0.5 are 5 an epoch, 4 Spanish at 2.5 are 10: every Spanish row two or three times."""
    sampler = MixedSampler(make_rows(), 5, upsample={"en": 0.5, "es": 2.5})
    drawn = Counter(i for batch in take(sampler, 3) for i in batch)
    assert sum(n for i, n in drawn.items() if i < 10) == 5
    assert sorted(n for i, n in drawn.items() if i >= 10) == [2, 2, 3, 3]
    assert sampler.epochs() == {"en": 0.5, "es": 2.5}
    left_out = MixedSampler(make_rows(), 5, upsample={"es": 0})
    assert all(i < 10 for batch in take(left_out, 10) for i in batch)


def test_a_loader_gives_the_same_batches():
    batches = MixedBatches(make_rows(), {"en": 2, "es": 1}, seed=4, steps=6)
    expected = [batches.batch(step) for step in range(6)]
    loader = DataLoader(batches.rows, batch_sampler=batches.sampler, collate_fn=collate)
    for got, want in zip(loader, expected, strict=True):
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_collate_pads_only_where_it_must():
    rows = [{"input_ids": [5, 6, 7], "forget": True}, {"input_ids": torch.tensor([8]), "forget": False}]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["forget"].tolist() == [True, False] and batch["forget"].dtype == torch.bool
    assert collate([{"input_ids": [1, 2], "labels": [-100, 2]}])["labels"].tolist() == [[-100, 2]]
    with pytest.raises(DataError, match="no row to collate"):
        collate([])


def test_a_filter_drops_flagged_rows():
    batch = MixedBatches(make_rows(), {"en": 2, "es": 2}).batch(0)
    kept = drop_rows(batch)
    assert kept["category"].tolist() == [0, 0]
    assert torch.equal(kept["input_ids"], batch["input_ids"][:2])
    with pytest.raises(DataError, match="no column 'flag'"):
        drop_rows(batch, "flag")
    with pytest.raises(DataError, match="leaves nothing"):
        drop_rows({"forget": torch.tensor([True])})


def test_refusals():
    rows = make_rows()
    cases: list[tuple[Any, Any, str]] = [
        ({"fr": 1}, None, "no category 'fr'; there are en, es"),
        ({"en": -1, "es": 2}, None, "'en': -1 is no number"),
        ({"en": 0}, None, "makes empty batches"),
        (0, None, "makes empty batches"),
        ({"en": 1}, {"es": 2.0}, "upsample needs per_batch as a size"),
        (4, {"en": 0, "es": 0}, "leaves no row to draw"),
        (4, {"en": float("nan")}, "is no number"),
    ]
    for per_batch, upsample, message in cases:
        with pytest.raises(DataError, match=message):
            MixedSampler(rows, per_batch, upsample)
    with pytest.raises(DataError, match="'es' has no row to draw"):
        MixedSampler(make_rows(spanish=0), {"en": 1, "es": 1})
    with pytest.raises(TypeError, match="endless"):
        len(MixedSampler(rows, 2))
    with pytest.raises(DataError, match="the saved batches had seed 1, these have 0"):
        MixedSampler(rows, 2).load_state_dict(MixedSampler(rows, 2, seed=1).state_dict())
