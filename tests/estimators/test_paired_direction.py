"""Gradients by example and the directions between pairs of them, against the definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, DataError, PlanError
from gradsurgery.estimators.paired_direction import DRAWS, agreement_of, noise_floor, principal
from tests.adapters.tiny import MODELS, ROWS, TOKENS, adapted, batch, clear, rows_of, stir

QUICK = settings(max_examples=6, deadline=None)


def loss(outputs: Any, given_batch: Any, refs: Any = None) -> Tensor:
    """In the dtype of the logits: the library's sums in fp32."""
    return torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), given_batch["labels"][:, 1:].flatten()
    )


def features(adapter: Any, given_batch: dict[str, Tensor], grain: Any = "sequence") -> Tensor:
    inputs = {k: v for k, v in given_batch.items() if k != "labels"}
    with adapter.probing(grain) as probes:
        value = loss(adapter.host(**inputs, use_cache=False), given_batch)
        return probes.gradients(value, list(adapter.coordinates), keep_graph=False)


def by_parameters(adapter: Any, given_batch: dict[str, Tensor]) -> Tensor:
    """The gradient of the gains from the gradients of the kept part's own parameters, one example."""
    clear(adapter)
    inputs = {k: v for k, v in given_batch.items() if k != "labels"}
    loss(adapter.host(**inputs, use_cache=False), given_batch).backward()
    out = []
    for part in adapter.parts.values():
        kept = part.kept
        if hasattr(kept, "up"):
            out.append(((kept.up0 + kept.up.weight) * kept.up.weight.grad).sum(0).detach())
        else:
            out.append(kept.weight.grad)
    return torch.cat(out)


@pytest.mark.parametrize("name", MODELS)
@QUICK
@given(st.sampled_from(["lora", "svd"]), st.integers(1, 8), st.integers(0, 99))
def test_one_backward_reads_the_gradient_of_every_example(name: str, kind: Any, rank: int, seed: int) -> None:
    adapter, given_batch = adapted(name, torch.float64, kind=kind, rank=rank), batch(seed=seed)
    found, by_token = features(adapter, given_batch), features(adapter, given_batch, "token")
    counts = (given_batch["labels"][:, 1:] != -100).sum(1)
    alone, grouped = [], []
    for i in range(ROWS):
        one = rows_of(given_batch, slice(i, i + 1))
        share = int(counts[i]) / int(counts.sum())
        alone.append(by_parameters(adapter, one) * share)
        grouped.append(features(adapter, one)[0] * share)
    scale = float(found.abs().max())
    assert (torch.stack(grouped) - torch.stack(alone)).abs().max() <= 1e-10 * scale
    in_double = name == "gpt2"  # the others compute norms, attention or experts in fp32, where batches round otherwise
    assert (found - torch.stack(grouped)).abs().max() <= (1e-10 if in_double else 1e-3) * scale
    assert (by_token.reshape(ROWS, TOKENS, -1).sum(1) - found).abs().max() <= 1e-12 * scale
    assert torch.equal(
        by_token.reshape(ROWS, TOKENS, -1)[given_batch["attention_mask"] == 0].any(), torch.tensor(False)
    )


@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_it_is_the_svd_of_the_differences(kind: Any) -> None:
    adapter = adapted("llama", torch.float64, kind=kind, rank=4)
    pairs = [(batch(3, seed=k), batch(3, seed=k + 10)) for k in range(2)]
    adapter.model.train()
    held = next(iter(adapter.parameters_of("kept").values()))
    held.grad = grad = torch.ones_like(held)
    found = gs.estimators.paired_direction(adapter.model, adapter, pairs, loss, k=2, noise="keep")
    assert adapter.model.training and held.grad is grad and torch.equal(grad, torch.ones_like(held))
    adapter.model.eval()
    rows = []
    with adapter.without("quarantine"):
        for one, other in pairs:
            for i in range(3):
                rows.append(
                    features(adapter, rows_of(one, slice(i, i + 1)))
                    - features(adapter, rows_of(other, slice(i, i + 1)))
                )
    start = 0
    for layer, axes in found.axes.items():
        d = torch.cat(rows)[:, start : start + 4]
        start += 4
        _, s, v = torch.linalg.svd(d, full_matrices=False)
        assert torch.allclose(found.values[layer].double(), s[:2], rtol=1e-5)
        assert torch.allclose((axes.double() @ v[:2].T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-5)
        votes = torch.sign(d @ axes[0].double()).sum()
        assert votes >= 0
        own = [principal(torch.cat([d[:i], d[i + 1 :]]), 1)[0][0].double() for i in range(6)]
        cosines = [float(d[i] @ own[i] / d[i].norm()) for i in range(6)]
        assert found.agreement[layer] == pytest.approx(sum(cosines) / 6, abs=1e-5)
    assert found.fingerprint == adapter.fingerprint and "6 pairs" in found.describe()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.floats(0, 3), st.integers(0, 999))
def test_signs_and_noise(pairs: int, rank: int, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(rank, generator=generator, dtype=torch.float64), dim=0)
    d = torch.randn(pairs, rank, generator=generator, dtype=torch.float64) / rank**0.5 + strength * truth
    axes, values = principal(d, min(pairs, rank))
    assert (torch.sign(d @ axes.double().T).sum(0) >= 0).all() and (values[:-1] >= values[1:]).all()
    assert torch.allclose(axes @ axes.T, torch.eye(len(axes)), atol=1e-5)
    flipped, _ = principal(-d, 1)
    assert torch.allclose(flipped[0], -axes[0], atol=1e-6) or torch.sign(d @ axes[0].double()).sum() == 0
    floor = noise_floor(d, torch.Generator().manual_seed(0))
    drawn = torch.nn.functional.normalize(
        torch.randn(DRAWS, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1
    )
    beaten = [abs(float(sum(row @ u / row.norm() for row in d)) / pairs) <= floor + 1e-12 for u in drawn]
    assert 0.95 * DRAWS <= sum(beaten) <= DRAWS
    assert -1 <= agreement_of(d) <= 1


def test_random_pairs_do_not_beat_noise_more_often_than_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    wins = 0
    for k in range(100):
        d = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        wins += agreement_of(d) > noise_floor(d, torch.Generator().manual_seed(k))
    assert wins <= 10
    shared = torch.randn(16, generator=generator, dtype=torch.float64)
    assert agreement_of(d + shared) > noise_floor(d + shared, generator)


def test_layers_below_noise_are_dropped() -> None:
    adapter = adapted("llama", rank=4)
    pairs = [(batch(3, seed=k), batch(3, seed=k + 10)) for k in range(2)]
    kept = gs.estimators.paired_direction(adapter.model, adapter, pairs, noise="keep")
    beats = kept.beats_noise
    assert 0 < sum(beats.values()) < len(beats), "choose other pairs: this test needs both kinds of layers"
    dropped = gs.estimators.paired_direction(adapter.model, adapter, pairs)
    for layer, axes in dropped.axes.items():
        assert torch.equal(axes, kept.axes[layer] if beats[layer] else torch.zeros_like(axes))
    assert dropped.overlap(kept) == pytest.approx(1.0) and abs(kept.overlap(kept.random(1))) < 0.9
    assert kept.random(1).coordinates == kept.coordinates and not torch.equal(
        kept.random(1).stacked, kept.random(2).stacked
    )
    with pytest.raises(DataError, match="in none of"):
        one = adapted("llama", modules="q_proj", rank=1)  # on a line every direction agrees as much
        gs.estimators.paired_direction(one.model, one, pairs)


def test_on_disk(tmp_path: Path) -> None:
    adapter = adapted("gpt2", rank=4)
    pairs = [(batch(3, seed=1), batch(3, seed=2))]
    direction = gs.estimators.paired_direction(adapter.host, adapter, pairs, k=2, noise="keep")
    path = tmp_path / "direction.safetensors"
    direction.save(path)
    again = gs.estimators.Direction.load(path, adapter)
    assert torch.equal(again.stacked, direction.stacked) and again.describe() == direction.describe()
    assert again.agreement == dict(direction.agreement) and again.about == direction.about
    for other in (adapted("gpt2", rank=4, seed=1), adapted("gpt2", rank=5), adapted("llama", rank=4)):
        with pytest.raises(ArtefactError, match="direction"):
            gs.estimators.Direction.load(path, other)
    with pytest.raises(ArtefactError, match="does not exist"):
        gs.estimators.Direction.load(tmp_path / "nowhere")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtefactError, match="truncated"):
        gs.estimators.Direction.load(path)


def test_bad_input() -> None:
    adapter, other = adapted("llama", rank=4), adapted("llama", rank=4)
    estimate: Any = gs.estimators.paired_direction
    pairs = [(batch(3, seed=1), batch(3, seed=2))]
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: estimate(other.model, adapter, pairs), PlanError, "not on this model"),
        (lambda: estimate(adapter.model, adapter, pairs, k=0), PlanError, "k is"),
        (lambda: estimate(adapter.model, adapter, pairs, noise="no"), PlanError, "noise is"),
        (lambda: estimate(adapter.model, adapter, []), DataError, "two pairs"),
        (lambda: estimate(adapter.model, adapter, [(batch(1), batch(1, seed=3))]), DataError, "two pairs"),
        (lambda: estimate(adapter.model, adapter, [(batch(2), batch(3))]), DataError, "2 unwanted and 3 wanted"),
        (lambda: estimate(adapter.model, adapter, [(batch(3), batch(3))]), DataError, "same gradients"),
        (lambda: estimate(adapter.model, adapter, [(3, 4)]), DataError, "pairs are"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    stir(adapter, float("nan"))
    with pytest.raises(DataError, match="nan"):
        estimate(adapter.model, adapter, pairs)
    adapter.remove()
    with pytest.raises(PlanError, match="not on this model"):
        estimate(adapter.model, adapter, pairs)
