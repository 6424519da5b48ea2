"""Settings: models of the sizes that their names say, twins around one memory, the largest batch that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.models import Setting


@pytest.mark.parametrize(
    ("name", "millions"),
    [("17m", 17.7), ("34m", 33.9), ("254m", 254.0), ("1b", 1235.8), ("8b", 8030.3), ("70b", 70553.7)],
)
def test_models_have_the_size_of_their_name(name: str, millions: float) -> None:
    assert sum(p.numel() for p in models.empty(name).parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_twin_shares_weights_and_moments_and_nothing_else() -> None:
    setting = Setting.of("tiny", "cpu")
    model = setting.build()
    optimizer = models.optimizer_of(model)
    models.stock_step(setting, model, optimizer, setting.ids())()
    other, follower = models.twin(model, optimizer)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert all(optimizer.state[a]["exp_avg"] is follower.state[b]["exp_avg"] for a, b in pairs)
    assert [*dict(model.named_parameters())] == [*dict(other.named_parameters())]  # what is tied stays tied
    before = [a.detach().clone() for a, _ in pairs]
    models.stock_step(setting, other, follower, setting.ids())()
    assert any(not torch.equal(a, old) for (a, _), old in zip(pairs, before, strict=True))
    assert all(a.grad is None and b.grad is None for a, b in pairs)


@pytest.mark.parametrize("room", [1, 2, 5, 16, 511, 512])
def test_fill_finds_the_largest_batch_by_halving(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def steps(setting: Setting, count: int) -> None:
        tried.append(setting.batch)
        if setting.batch > room:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(models, "steps", steps)
    monkeypatch.setattr(models, "release", lambda: None)
    setting = Setting.of("tiny", "cpu", batch=1)
    if room < models.LEAST:
        with pytest.raises(torch.OutOfMemoryError):
            models.fill(setting)
    else:
        found = models.fill(setting)
        assert found.batch <= room < 2 * found.batch or found.batch == models.MOST
        assert tried == sorted(tried, reverse=True)


def test_settings_of_accelerators_are_bf16_and_of_cpus_fp32() -> None:
    found: dict[str, Any] = {name: Setting.of(name, "cuda") for name in ("34m", "1b", "8b")}
    assert [s.dtype for s in found.values()] == ["autocast", "bf16", "bf16"]
    assert all(s.batch == 0 for s in found.values())  # to be filled
    assert Setting.of("34m", "cpu").dtype == "fp32"
    assert Setting.of("34m", "cpu", batch=2, tokens=8).ids().shape == (2, 8)


@pytest.mark.parametrize("dtype", ["fp32", "autocast", "bf16"])
def test_every_precision_trains(dtype: str) -> None:
    setting = Setting("tiny", "cpu", dtype, False, 2, 8)
    models.steps(setting, 2)
    weight = next(setting.build().parameters())
    assert weight.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
