from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import DataError, KeyStateError
from gradsurgery.evaluation import evaluate
from gradsurgery.evaluation.tiers import (
    corrupted_keys,
    corrupted_weights,
    evaluate_tiers,
    partial_keys,
    planted_facts,
    recovery_by_gradient,
    recovery_by_magnitude,
    sample_tiers,
    score,
    tier_recall,
    wrong_keys,
)
from gradsurgery.evaluation.tiers import scores as module
from tests.evaluation.test_losses import Fixed
from tests.evaluation.tiers import IDS, TEXT, bits, keyed, same


def test_accuracy_by_hand() -> None:
    """Two of three tokens are the input plus one, which the model ranks first; padding does not count."""
    found = score(Fixed(1.0), {"x": torch.tensor([[0, 1, 2, 0], [3, 0, -100, -100]])}, batch_size=1)["x"]
    assert found["accuracy"] == pytest.approx(3 / 4) and found["tokens"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_tiers_are_the_model_without_and_with_the_key(kind: str) -> None:
    model, anatomy, key = keyed(kind, attention_ratio=0.2)
    before, tiers = bits(model), evaluate_tiers(model, key, anatomy, TEXT)
    assert {name: {k: v for k, v in s.items() if k != "accuracy"} for name, s in tiers["C1"].items()} == evaluate(
        model, TEXT
    )
    with key.applied(model):
        assert tiers["C2"] == score(model, TEXT)
    assert tiers["C1"] != tiers["C2"] and same(before, model)


def test_several_tiers() -> None:
    model, anatomy, _ = keyed()
    one, other = gs.PermutationKey.generate(anatomy, fraction=0.2, attention_ratio=0.0, count=2, seed=0)
    tiers = evaluate_tiers(model, {"C2": one, "C3": gs.PermutationKey.compose(one, other)}, anatomy, TEXT)
    assert list(tiers) == ["C1", "C2", "C3"]
    assert len({found["one"]["loss"] for found in tiers.values()}) == 3
    with pytest.raises(DataError, match="C1 is the model without a key"):
        evaluate_tiers(model, {"C1": one}, anatomy, TEXT)


class Words:
    """A tokenizer of bytes, modulo the vocabulary."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text: Any, return_tensors: str | None = None, add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        ids = [ord(c) % 60 + 1 for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(str(int(i)) for i in ids)


EVALUATIONS: list[Callable[..., Any]] = [
    evaluate_tiers,
    partial(wrong_keys, count=2),
    partial(corrupted_keys, shares=(0.0, 0.5), draws=1),
    partial(partial_keys, shares=(0.5, 1.0), subsets=1),
    partial(corrupted_weights, shares=(0.5,), draws=1),
    lambda m, k, a, t: sample_tiers(m, k, a, ["ab"], Words(), max_new_tokens=2),
    lambda m, k, a, t: tier_recall(m, k, a, planted_facts(2), Words()),
    lambda m, k, a, t: recovery_by_magnitude(m, k, a),
    lambda m, k, a, t: recovery_by_gradient(m, k, a, t["one"]),
]


@pytest.mark.parametrize("run", EVALUATIONS)
def test_every_evaluation_leaves_the_model_alone_and_is_deterministic(run: Callable[..., Any]) -> None:
    model, anatomy, key = keyed()
    model.train()
    model.get_submodule("transformer.h.0").eval()
    modes, before = [m.training for m in model.modules()], bits(model)
    gradient = torch.ones_like(model.get_parameter("transformer.wte.weight"))
    model.get_parameter("transformer.wte.weight").grad = gradient
    draws = torch.random.get_rng_state()
    try:
        first = run(model, key, anatomy, TEXT)
        assert run(model, key, anatomy, TEXT) == first
        assert torch.equal(torch.random.get_rng_state(), draws)
        assert same(before, model) and [m.training for m in model.modules()] == modes
        assert model.get_parameter("transformer.wte.weight").grad is gradient and bool((gradient == 1).all())
    finally:
        model.zero_grad()
        model.eval()


@pytest.mark.parametrize("run", EVALUATIONS[:7])
def test_c1_is_back_after_an_exception(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy, key = keyed()
    before, calls = bits(model), []

    def fail(module: Any, inputs: Any, kwargs: Any) -> None:
        calls.append(1)
        if gs.keys.configuration_of(module).now:
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, key, anatomy, TEXT)
    finally:
        handle.remove()
    assert calls and same(before, model) and not gs.keys.configuration_of(model).now


@pytest.mark.parametrize("run", EVALUATIONS)
def test_a_keyed_model_is_refused(run: Callable[..., Any]) -> None:
    model, anatomy, key = keyed()
    with key.applied(model), pytest.raises(KeyStateError, match="needs the model in C1"):
        run(model, key, anatomy, TEXT)


def test_the_bar_can_be_switched_on(capsys: pytest.CaptureFixture[str]) -> None:
    model, anatomy, key = keyed()
    evaluate_tiers(model, key, anatomy, TEXT)
    assert capsys.readouterr().err == ""  # no terminal
    evaluate_tiers(model, key, anatomy, TEXT, progress=True)
    assert "tiers" in capsys.readouterr().err


def test_bad_input() -> None:
    model, anatomy, key = keyed()
    with pytest.raises(DataError, match="holds nothing to predict"):
        evaluate_tiers(model, key, anatomy, {"x": IDS[:, :1]})
    with pytest.raises(DataError, match="batch_size=0"):
        evaluate_tiers(model, key, anatomy, TEXT, batch_size=0)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        sample_tiers(model, key, anatomy, ["a", ""], Words())
    assert module.tier_keys(key) == {"C1": None, "C2": key}


def test_samples_are_what_generate_gives() -> None:
    model, anatomy, key = keyed()
    rows = sample_tiers(model, key, anatomy, ["abc", "hello"], Words(), max_new_tokens=5)
    assert [row["prompt"] for row in rows] == ["abc", "hello"]
    for row in rows:
        ids = Words()(row["prompt"], return_tensors="pt")["input_ids"]
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, **given)  # type: ignore[operator]
        assert row["C1"] == Words().decode(out[0, ids.shape[1] :], True)
    assert any(row["C1"] != row["C2"] for row in rows)
    sampled = [sample_tiers(model, key, anatomy, ["abc"], Words(), 8, do_sample=True, seed=s) for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
