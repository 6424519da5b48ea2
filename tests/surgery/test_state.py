"""The state of a surgery: what it holds, how it is stored, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import ArtefactError
from gradsurgery.surgery.checkpoint import load_state, save_state
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.stages import GradientTransform
from tests.surgery.tiny import batch, build, gap, sgtm, weights


class Mean(GradientTransform):
    """A stateful transform: the running mean of the gradient of one parameter."""

    traits: ClassVar[Traits] = Traits(linear=True, stateful=True)

    def init(self, space: Any) -> dict[str, Any]:
        return {"mean": torch.zeros(space.shapes["model.norm.weight"]), "steps": 0}

    def apply(self, context: Any, state: dict[str, Any]) -> None:
        parameter = context.parameters["model.norm.weight"]
        state["mean"], state["steps"] = 0.5 * state["mean"] + 0.5 * parameter.grad, state["steps"] + 1
        parameter.grad.copy_(state["mean"])


def method() -> gs.Method:
    once = gs.sample_one(seed=1)
    return gs.Method([gs.Pass("a", when=once), gs.Pass("b", weight=0.5, when=once)], gradient=[Mean(), gs.clip(1.0)])


def steps(surgery: gs.Surgery, optimizer: torch.optim.Optimizer, numbers: range) -> list[str]:
    ran = []
    for k in numbers:
        ran += list(surgery.backward(batch(seed=k)))
        optimizer.step()
        optimizer.zero_grad()
    return ran


def test_a_resumed_surgery_continues_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, first = build(), build()
    ran = steps(gs.attach(method(), whole, one := torch.optim.SGD(whole.parameters(), lr=0.1)), one, range(6))
    surgery = gs.attach(method(), first, two := torch.optim.SGD(first.parameters(), lr=0.1))
    begun = steps(surgery, two, range(3))
    save_state(surgery.state_dict(), tmp_path)
    surgery.remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["surgery.json", "surgery.safetensors"]
    resumed = gs.attach(method(), first, two)
    resumed.load_state_dict(load_state(tmp_path))
    assert resumed.step == 3
    assert begun + steps(resumed, two, range(3, 6)) == ran
    assert gap(weights(whole), weights(first)) == 0.0


def test_a_plain_state_is_one_readable_file(tmp_path: Path) -> None:
    model = build()
    with gs.attach(sgtm(), model) as surgery:
        save_state(surgery.state_dict(), tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["surgery.json"]
        stored = json.loads((tmp_path / "surgery.json").read_text())
        assert set(stored) == {"format", "version", "fingerprint", "method", "step"}
        assert stored["method"] == sgtm().describe()
        assert load_state(tmp_path) == surgery.state_dict() == stored


def test_states_of_other_models_and_methods_are_refused(tmp_path: Path) -> None:
    model = build()
    with gs.attach(sgtm(), model) as surgery:
        state = surgery.state_dict()
        for change, match in (
            ({"fingerprint": "0" * 16}, "another fingerprint"),
            ({"method": {"passes": []}}, "another method"),
            ({"transforms": {"0": {}}}, "keeps transforms"),
        ):
            with pytest.raises(ArtefactError, match=match):
                surgery.load_state_dict({**state, "step": 5, **change})
            assert surgery.step == 0
        with pytest.raises(ArtefactError, match="no surgery state"):
            surgery.load_state_dict({"step": 5})
    with pytest.raises(ArtefactError, match="does not exist"):
        load_state(tmp_path)
    (tmp_path / "surgery.json").write_text('{"step": 3')
    with pytest.raises(ArtefactError, match="truncated"):
        load_state(tmp_path)


def test_the_state_of_a_method_with_another_strategy_is_refused() -> None:
    with gs.attach(sgtm(), build()) as surgery:
        state = surgery.state_dict()
    with gs.attach(sgtm(strategy="zero"), build()) as surgery, pytest.raises(ArtefactError, match="another method"):
        surgery.load_state_dict(state)
