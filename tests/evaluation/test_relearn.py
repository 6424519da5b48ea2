"""Relearning: the steps are counted right, and nothing is left of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import DataError
from gradsurgery.evaluation import evaluate, relearn
from gradsurgery.evaluation.relearn import _batches, _pairs
from tests.surgery.tiny import VOCABULARY, anatomy, build, forget_of, weights


def data(seed: int = 0, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(3, VOCABULARY // 2, (rows, 8), generator=generator)
    high = torch.randint(VOCABULARY // 2, VOCABULARY, (rows + 1, 8), generator=generator)
    high[0, 5:] = -1
    return low, high


def by_hand(model: Any, forget: Tensor, retain: Tensor, steps: int, lr: float) -> list[float]:
    """The plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    out = [evaluate(model, {"f": forget}, 4)["f"]["loss"]]
    for _, batch in zip(range(steps), _batches(_pairs(forget, retain), 2, 0, torch.device("cpu")), strict=False):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
        labels = batch["labels"][:, 1:]
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(evaluate(model, {"f": forget}, 4)["f"]["loss"])
    return out


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_steps_are_those_of_a_plain_loop(kind: str) -> None:
    forget, retain = data()
    losses = by_hand(build(kind), forget, retain, 12, 5e-3)
    level = (losses[7] + losses[8]) / 2
    first = next(step for step, loss in enumerate(losses) if loss <= level)
    model = build(kind)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, state = weights(model), torch.random.get_rng_state()
    found = relearn(model, None, forget, retain, level, steps=12, every=1, batch_size=4, lr=5e-3)
    assert found.steps == first and len(found.curve) == first + 1
    assert [p.forget for p in found.curve] == pytest.approx(losses[: first + 1], abs=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and model.training
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))
    assert torch.equal(torch.random.get_rng_state(), state)
    late = relearn(model, None, forget, retain, level, steps=12, every=5, batch_size=4, lr=5e-3)
    assert late.steps == 5 * -(-first // 5) if first <= 10 else late.steps == 12
    assert relearn(model, None, forget, retain, losses[0] + 1).steps == 0
    assert relearn(model, None, forget, retain, 0.0, steps=2, every=1, batch_size=4).steps is None
    assert "not back" in str(relearn(model, None, forget, retain, 0.0, steps=1, batch_size=4))


def test_each_batch_is_half_and_half_and_no_sequence_comes_twice_before_all_came() -> None:
    forget, retain = torch.arange(14).reshape(7, 2), torch.arange(100, 110).reshape(5, 2)
    seen: list[int] = []
    for _, batch in zip(range(7), _batches(_pairs(forget, retain), 2, 0, torch.device("cpu")), strict=False):
        assert batch["forget"].tolist() == [True, True, False, False] and torch.equal(batch["retain"], ~batch["forget"])
        assert (batch["input_ids"][:2] < 14).all() and (batch["input_ids"][2:] >= 100).all()
        seen += batch["input_ids"][:2, 0].tolist()
    assert sorted(seen[:7]) == sorted(seen[7:]) == forget[:, 0].tolist()


def test_prompts_are_read_and_left_out_of_the_loss() -> None:
    forget, retain = data()
    prompts = torch.arange(8) < torch.arange(1, 7)[:, None]
    text = (forget, forget.masked_fill(prompts, -100))
    seen: list[Tensor] = []

    def loss(outputs: Any, batch: Any, refs: Any) -> Tensor:
        seen.append(batch["labels"][:2])
        return gs.losses.causal_lm(outputs, batch, refs)

    model = build()
    found = relearn(model, gs.Method([gs.Pass("p", loss)]), text, retain, 0.0, steps=3, batch_size=4)
    chosen = {tuple(row.tolist()) for row in text[1]}
    assert len(seen) == 3 and {tuple(row.tolist()) for rows in seen for row in rows} == chosen
    with torch.no_grad():  # one row after the other: what follows the prompt alone
        logits = model(input_ids=forget, use_cache=False).logits
    each = [
        torch.nn.functional.cross_entropy(logits[b, t - 1], forget[b, t])
        for b in range(6)
        for t in range(1, 8)
        if t > b
    ]
    assert found.curve[0].forget == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)
    with_all = relearn(model, None, forget, (retain, retain), 0.0, steps=3, batch_size=4)
    assert with_all.curve == relearn(model, None, (forget, forget), retain, 0.0, steps=3, batch_size=4).curve
    assert with_all.curve[-1].forget != found.curve[-1].forget


def test_by_a_method_and_without_restoring() -> None:
    model, (forget, retain) = build(), data()
    before, units = weights(model), forget_of()
    found = relearn(
        model,
        gs.methods.sgtm(anatomy(), units),
        forget,
        retain,
        0.0,
        (forget, retain),
        steps=2,
        batch_size=4,
        restore=False,
    )
    assert [p.step for p in found.curve] == [0, 2] and found.rows()[1]["forget"] < found.rows()[0]["forget"]
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    some = [p for name, p in model.named_parameters() if "mlp" in name]
    now = weights(model)
    relearn(model, None, forget, retain, 0.0, steps=1, batch_size=4, parameters=some, restore=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, now[name])}
    assert moved == {name for name in now if "mlp" in name}


def test_the_model_is_restored_after_an_exception() -> None:
    model, (forget, retain) = build(), data()
    before = weights(model)

    def loss(outputs: Any, batch: Any, refs: Any) -> Tensor:
        if not torch.equal(next(model.parameters()), next(iter(before.values()))):
            raise RuntimeError("stop")
        return gs.losses.causal_lm(outputs, batch, refs)

    with pytest.raises(RuntimeError, match="stop"):
        relearn(model, gs.Method([gs.Pass("p", loss)]), forget, retain, 0.0, batch_size=4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    gs.attach(gs.Method([gs.Pass("p")]), model).remove()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 3}, "even"),
    ({"steps": 0}, "positive"),
    ({"level": float("nan")}, "level"),
    ({"forget": torch.zeros(0, 8, dtype=torch.long)}, "nothing to learn"),
    ({"retain": torch.full((2, 8), -1)}, "nothing to learn"),
    ({"forget": torch.ones(2, 5, dtype=torch.long)}, "pad the shorter"),
    ({"forget": (torch.ones(2, 8).long(), torch.full((2, 8), -100))}, "nothing to learn"),
    ({"retain": (torch.ones(2, 8).long(), torch.ones(2, 7).long())}, "of one shape"),
    ({"parameters": []}, "no parameter"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_input(given: dict[str, Any], message: str) -> None:
    forget, retain = data()
    with pytest.raises(DataError, match=message):
        relearn(build(), **{"method": None, "forget": forget, "retain": retain, "level": 1.0, **given})
