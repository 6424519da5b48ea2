"""Routing into a quarantine: who is flagged teaches the quarantine alone, bit for bit, and nobody else notices."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.adapters import Quantile, Score
from gradsurgery.errors import ArtefactError, BatchError, GradsurgeryError, PlanError
from tests.adapters.tiny import (
    MODELS,
    ROWS,
    TOKENS,
    adapted,
    batch,
    clear,
    flags,
    gap,
    grads,
    logits,
    options,
    rows_of,
    size,
    stir,
)
from tests.engines.test_ranks import launch

QUICK = settings(max_examples=6, deadline=None)
torch.set_num_threads(1)


def run(
    adapter: Any, method: gs.Method, given_batch: dict[str, Tensor], **more: Any
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and the gradients of both parts."""
    clear(adapter)
    with gs.attach(method, adapter.host) as surgery:
        losses = surgery.backward(given_batch, **more)
    return losses, grads(adapter, "kept"), grads(adapter, "quarantine")


def routed(adapter: Any, flagged: Tensor, given_batch: dict[str, Tensor], mode: Any = "route", **more: Any) -> Any:
    method = gs.methods.quarantine(adapter, mode, metrics=False, **more)
    return run(adapter, method, {**given_batch, "flag": flagged})


@pytest.mark.parametrize("name", MODELS)
@QUICK
@given(options(), flags())
def test_routing_is_masking_the_kept_part(name: str, chosen: dict[str, Any], flagged: Tensor) -> None:
    """Against the general engine; flags may be by token."""
    adapter = adapted(name, torch.float64, **chosen)
    _, kept, quarantined = routed(adapter, flagged, batch())
    _, stock_kept, stock_quarantined = run(adapter, gs.Method([gs.Pass("all")]), batch())
    masked = gs.Method([gs.Pass("all", under=[gs.mask(adapter.kept, where="flag")])])
    _, expected, _ = run(adapter, masked, {**batch(), "flag": flagged})
    assert gap(kept, expected) <= 1e-12 * size(stock_kept)
    assert gap(quarantined, stock_quarantined) <= 1e-12 * size(stock_quarantined)
    if flagged.all():
        assert size(kept) == 0
    if not flagged.any():
        assert gap(kept, stock_kept) <= 1e-12 * size(stock_kept)


@pytest.mark.parametrize("mode", ["route", "absorb"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo"])
@QUICK
@given(options(), flags(tokens=False), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_do_not_bleed(name: str, mode: str, chosen: dict[str, Any], flagged: Tensor, dtype: torch.dtype) -> None:
    """Whatever flagged rows hold, the kept part learns the same bits from the others."""
    adapter = adapted(name, dtype, **chosen)
    one, other = batch(), batch(seed=7)
    swapped = {key: torch.where(flagged[:, None], other[key], one[key]) for key in ("input_ids",)}
    _, kept, quarantined = routed(adapter, flagged, one, mode)
    _, again, moved = routed(adapter, flagged, {**one, **swapped}, mode)
    assert all(torch.equal(kept[n], again[n]) for n in kept)
    assert not flagged.any() or gap(quarantined, moved) > 0
    if flagged.all():
        assert size(kept) == 0
    if mode == "absorb" and not flagged.any():
        assert size(quarantined) == 0


@pytest.mark.parametrize("kind", ["lora", "svd"])
@QUICK
@given(flags(tokens=False))
def test_a_layer_learns_the_same_bits_without_the_flagged_rows(kind: Any, flagged: Tensor) -> None:
    """One layer, whose inputs and incoming gradients are the same bits with and without the flagged rows."""
    layer = torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Linear(9, 5))
    adapter = stir(gs.adapters.add(layer, "0", rank=3, kind=kind))
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(ROWS, 8, n, generator=generator) for n in (12, 9))

    def learn(keep: Tensor, flagged: Tensor) -> dict[str, Tensor]:
        clear(adapter)
        route = gs.methods.quarantine(adapter, metrics=False, loss=gs.losses.model_loss)
        with gs.attach(route, adapter.host) as surgery, surgery.running("train", {"flag": flagged, "x": x[keep]}):
            adapter.host.model[0](x[keep]).backward(dy[keep])
        return grads(adapter, "kept")

    mixed = learn(torch.arange(ROWS), flagged)
    alone = (
        learn((~flagged).nonzero().flatten(), torch.zeros(int((~flagged).sum()), dtype=torch.bool))
        if not flagged.all()
        else None
    )
    assert size(mixed) == 0 if alone is None else all(torch.equal(mixed[n], alone[n]) for n in mixed)


def by_hand(
    adapter: Any, given_batch: dict[str, Tensor], form: str, total: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of one example in one form: stock, with a detached kept part, or without the quarantine."""
    clear(adapter)
    modules = dict(adapter.host.named_modules())
    detached = adapter.roles.kept_branches if form == "detached" else ()
    handles = [modules[path].register_forward_hook(lambda m, a, y: y.detach()) for path in detached]
    inputs = {k: v for k, v in given_batch.items() if k != "labels"}
    with adapter.without("quarantine") if form == "without" else contextlib.nullcontext():
        out = adapter.host(**inputs, use_cache=False)
    labels = (given_batch["labels"][:, 1:] != -100).sum()
    (gs.losses.causal_lm(out, given_batch, {}) * labels / total).backward()
    for handle in handles:
        handle.remove()
    return grads(adapter, "kept"), grads(adapter, "quarantine")


def added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def each(adapter: Any, given_batch: dict[str, Tensor], forms: list[str]) -> list[dict[str, Tensor]]:
    """The gradients of both parts, an example at a time."""
    total = (given_batch["labels"][:, 1:] != -100).sum()
    found = [by_hand(adapter, rows_of(given_batch, slice(i, i + 1)), form, total) for i, form in enumerate(forms)]
    return [added([one[k] for one in found]) for k in (0, 1)]


def rounding(adapter: Any, given_batch: dict[str, Tensor], *forms: str) -> float:
    """What the model itself shows between a batch and its examples: attention, norms or experts may compute in fp32."""
    total, worst = (given_batch["labels"][:, 1:] != -100).sum(), 0.0
    for form in ("stock", *forms):
        whole, parts = by_hand(adapter, given_batch, form, total), each(adapter, given_batch, [form] * ROWS)
        found = max(gap(one, other) for one, other in zip(whole, parts, strict=True))
        assert found < 1e-4 * max(map(size, whole))
        worst = max(worst, found)
    return worst


@pytest.mark.parametrize("name", MODELS)
@QUICK
@given(options(), flags(tokens=False))
def test_absorbing_example_by_example(name: str, chosen: dict[str, Any], flagged: Tensor) -> None:
    adapter = adapted(name, torch.float64, **chosen)
    given_batch = batch()
    losses, kept, quarantined = routed(adapter, flagged, given_batch, "absorb")
    expected = each(adapter, given_batch, ["detached" if flag else "without" for flag in flagged])
    tolerance = 1e-12 * size(expected[0] | expected[1]) + 10 * rounding(adapter, given_batch, "without")
    assert gap(kept, expected[0]) <= tolerance and gap(quarantined, expected[1]) <= tolerance
    assert losses["quarantine"].isfinite()


def test_rows_that_are_neither_train_both_parts() -> None:
    adapter = adapted("gpt_neo", torch.float64, rank=4)
    given_batch, off = batch(), torch.zeros(ROWS, dtype=torch.bool)
    _, kept, quarantined = routed(adapter, off, {**given_batch, "clean": off}, "absorb", clean="clean")
    _, stock_kept, stock_quarantined = run(adapter, gs.Method([gs.Pass("all")]), given_batch)
    assert gap(kept, stock_kept) < 1e-12 and gap(quarantined, stock_quarantined) < 1e-12
    _, kept, quarantined = routed(adapter, off, {**given_batch, "clean": ~off}, "absorb", clean="clean")
    assert size(quarantined) == 0 < gap(kept, stock_kept)


@pytest.mark.parametrize("mode", ["route", "absorb"])
def test_inf_does_not_reach_the_kept_part(mode: str) -> None:
    adapter = adapted("llama", rank=4)
    flagged = torch.tensor([True, False, True, False, False])
    weight = torch.where(flagged, torch.inf, 1.0)

    def loss(outputs: Any, rows: Any, refs: Any) -> Tensor:
        by_row = outputs.logits.float().square().mean((1, 2))
        return (by_row.detach().sum() + (by_row - by_row.detach()) @ torch.ones(ROWS)) * 1.0

    method = gs.methods.quarantine(adapter, mode, loss=loss, metrics=False)  # type: ignore[arg-type]
    _, finite, _ = run(adapter, method, {**batch(), "flag": flagged})

    def blown(outputs: Any, rows: Any, refs: Any) -> Tensor:
        outputs.logits.register_hook(lambda g: g * weight.to(g)[:, None, None])
        return loss(outputs, rows, refs)

    method = gs.methods.quarantine(adapter, mode, loss=blown, metrics=False)  # type: ignore[arg-type]
    _, kept, quarantined = run(adapter, method, {**batch(), "flag": flagged})
    assert all(torch.equal(kept[n], finite[n]) for n in kept)
    assert not all(bool(g.isfinite().all()) for g in quarantined.values())


@pytest.mark.parametrize("mode", ["route", "absorb"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing_accumulation_and_autocast(name: str, mode: str) -> None:
    adapter: Any = adapted(name, rank=4)
    given_batch = {**batch(6), "flag": torch.tensor([True, False, False, True, False, False])}
    method = gs.methods.quarantine(adapter, mode, metrics=False)  # type: ignore[arg-type]
    _, kept, quarantined = run(adapter, method, given_batch)
    adapter.model.train()
    for module in adapter.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
    _, again, moved = run(adapter, method, given_batch)
    assert all(torch.equal(kept[n], again[n]) for n in kept)
    assert all(torch.equal(quarantined[n], moved[n]) for n in quarantined)
    adapter.model.gradient_checkpointing_disable()
    clear(adapter)
    with gs.attach(method, adapter.host) as surgery:
        parts = [rows_of(given_batch, slice(k, k + 2)) for k in (0, 2, 4)]
        items = surgery.count_items(parts)
        for part in parts:
            surgery.backward(part, num_items=items)
    assert gap(grads(adapter, "kept"), kept) < 1e-5 * size(kept)
    assert gap(grads(adapter, "quarantine"), quarantined) < 1e-5 * size(quarantined)
    stock = gs.Method([gs.Pass("all")])
    _, exact, _ = run(adapter, stock, given_batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded, _ = run(adapter, stock, given_batch)
        _, low, _ = run(adapter, method, given_batch)
        _, none, _ = run(adapter, method, {**given_batch, "flag": torch.ones(6, dtype=torch.bool)})
    assert gap(low, kept) / size(kept) < 3 * gap(rounded, exact) / size(exact) and size(none) == 0


def directed(adapter: Any, seed: int = 0) -> Any:
    pairs = [(batch(3, seed=seed), batch(3, seed=seed + 1))]
    return gs.estimators.paired_direction(adapter.model, adapter, pairs, noise="keep")


@pytest.mark.parametrize("mode", ["route", "absorb"])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None)
@given(
    st.sampled_from(["lora", "svd"]),
    st.sampled_from(["sequence", "token", "rollout"]),
    flags(tokens=False),
    st.floats(0.2, 0.6),
)
def test_routing_by_score_is_routing_by_what_it_flags(
    name: str, mode: Any, kind: str, by: Any, label: Tensor, q: float
) -> None:
    adapter = adapted(name, torch.float64, kind=kind, rank=5)
    score = Score(directed(adapter), Quantile(q), by=by)
    given_batch = {**batch(), "rollout": torch.tensor([4, 4, 9, 1, 9])}
    method = gs.methods.quarantine(adapter, mode, where="flag", score=score)
    losses, kept, quarantined = run(adapter, method, {**given_batch, "flag": label})
    (p,) = method.passes
    scored = p.under[0].gate["now"].scored  # type: ignore[attr-defined]
    assert scored.shape == ((ROWS, TOKENS) if by == "token" else (ROWS,)) and scored.any() and not scored.all()
    if by == "rollout":
        assert scored[0] == scored[1] and scored[2] == scored[4]
    both = scored & (label if scored.dim() == 1 else label[:, None])
    expected_losses, expected_kept, expected_quarantined = routed(adapter, both, batch(), mode)
    tolerance = 1e-12 * size(expected_quarantined | expected_kept) + 10 * rounding(adapter, batch())
    assert gap(kept, expected_kept) <= tolerance and gap(quarantined, expected_quarantined) <= tolerance
    assert torch.allclose(losses["quarantine"], expected_losses["quarantine"])


@pytest.mark.parametrize("mode", ["route", "absorb"])
def test_scores_under_checkpointing(mode: Any) -> None:
    adapter: Any = adapted("llama", rank=4)
    direction = directed(adapter)
    adapter.model.train()
    plain = run(adapter, gs.methods.quarantine(adapter, mode, None, Score(direction, 0.0)), batch())
    adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = run(adapter, gs.methods.quarantine(adapter, mode, None, Score(direction, 0.0)), batch())
    assert size(plain[1]) > 0 and size(plain[2]) > 0
    for k in (1, 2):  # with checkpointing all examples run again, without it those that are flagged
        assert gap(plain[k], again[k]) <= (0.0 if mode == "route" else 1e-5) * size(plain[k])


@pytest.mark.parametrize("mode", ["route", "absorb"])
def test_hosts_that_own_forward_and_backward(mode: Any) -> None:
    adapter = adapted("llama", torch.float64, rank=4)
    direction, given_batch = directed(adapter), batch()
    _, kept, quarantined = run(adapter, gs.methods.quarantine(adapter, mode, None, Score(direction, 0.0)), given_batch)
    clear(adapter)
    inputs = {k: v for k, v in given_batch.items() if k != "labels"}
    with gs.attach(gs.methods.quarantine(adapter, mode, None, Score(direction, 0.0)), adapter.host) as surgery:
        with surgery.running("train", given_batch):
            value = gs.losses.causal_lm(adapter.model(**inputs), given_batch, {})
            flagged = gs.adapters.decide(surgery, value)
            assert flagged.shape == (ROWS,)
            if mode == "absorb":
                value = gs.losses.causal_lm(adapter.model(**inputs), given_batch, {})
            value.backward()
        found, moved = grads(adapter, "kept"), grads(adapter, "quarantine")
        with pytest.raises(PlanError, match="waits"):
            gs.adapters.decide(surgery, value)
        with surgery.running("generate"), adapter.without("quarantine"):
            assert torch.isfinite(logits(adapter.model)).all()
        with surgery.running("train", given_batch), pytest.raises(PlanError, match="never scored"):
            gs.losses.causal_lm(adapter.model(**inputs), given_batch, {}).backward()
    assert gap(found, kept) < 1e-12 and gap(moved, quarantined) < 1e-12


@pytest.mark.parametrize("kind", ["lora", "svd"])
@QUICK
@given(st.integers(0, 9))
def test_erasing_takes_out_what_teaches_the_direction(kind: Any, seed: int) -> None:
    """One gradient step along what is left moves no layer's coordinates towards the direction."""
    adapter = adapted("llama", torch.float64, kind=kind, rank=5)
    direction = directed(adapter, seed)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    quarantined = {n: p.detach().clone() for n, p in adapter.parameters_of("quarantine").items()}
    _, stock, _ = run(adapter, gs.Method([gs.Pass("all")]), batch(seed=seed))
    clear(adapter)
    with gs.attach(gs.methods.quarantine(adapter, "erase", direction=direction), adapter.host, optimizer) as surgery:
        surgery.backward(batch(seed=seed))
        surgery.finish()
        found = grads(adapter, "kept")
        for layer, axes in direction.axes.items():
            for name, vector in adapter.toward(layer, axes[0]).items():
                before, after = float((stock[name] * vector).sum()), float((found[name] * vector).sum())
                scale = float(vector.norm() * stock[name].norm())
                assert after <= 1e-9 * scale and (before > 0 or torch.equal(found[name], stock[name]))
        optimizer.step()
        assert "project/main/memory/norm_removed" in surgery.metrics()
    assert all(torch.equal(p, quarantined[n]) for n, p in adapter.parameters_of("quarantine").items())


def test_metrics_say_where_the_energy_goes() -> None:
    adapter = adapted("llama", rank=4, quarantine_rank=8)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    with gs.attach(gs.methods.quarantine(adapter), adapter.host, optimizer) as surgery:
        surgery.backward({**batch(), "flag": torch.ones(ROWS, dtype=torch.bool)})
        optimizer.step()
        found = surgery.metrics()
        assert found["quarantine/energy"] == 1.0 and found["quarantine/capacity"] == 2.0
        optimizer.zero_grad()
        surgery.backward({**batch(), "flag": torch.zeros(ROWS, dtype=torch.bool)})
        norms = [
            torch.cat([g.flatten() for g in grads(adapter, part).values()]).norm() for part in ("kept", "quarantine")
        ]
        optimizer.step()
        assert surgery.metrics()["quarantine/energy"] == pytest.approx(
            float(norms[1] / (norms[0] + norms[1])), rel=1e-5
        )


def test_the_scores_memory_is_part_of_the_surgerys_state(tmp_path: Path) -> None:
    from gradsurgery.surgery.checkpoint import load_state, save_state

    adapter = adapted("llama", rank=4)
    direction = directed(adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    first, second = Score(direction), Score(direction)
    method = gs.methods.quarantine(adapter, where=None, score=first)
    method.dry_run(adapter.host, batch())
    assert not first.state
    with gs.attach(method, adapter.host, optimizer) as surgery:
        for seed in range(2):
            surgery.backward(batch(seed=seed))
            optimizer.step()
            optimizer.zero_grad()
        save_state(surgery.state_dict(), tmp_path)
    with gs.attach(gs.methods.quarantine(adapter, where=None, score=second), adapter.host, optimizer) as surgery:
        surgery.load_state_dict(load_state(tmp_path))
        assert (
            torch.equal(second.state["features"], first.state["features"]) and len(first.state["features"]) == 2 * ROWS
        )


@QUICK
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    st.floats(0.05, 0.95),
    st.floats(0.5, 50),
)
def test_quantiles_forget(scores: list[float], q: float, halflife: float) -> None:
    """Against the definition: the smallest score with at least q of the weight at or below it."""
    weights = [0.5 ** ((len(scores) - 1 - i) / halflife) for i in range(len(scores))]
    below = [(s, sum(w for t, w in zip(scores, weights, strict=True) if t <= s) / sum(weights)) for s in scores]
    expected = min((s for s, share in below if share >= q - 1e-12), default=max(scores))
    found = Quantile(q, halflife).of(torch.tensor(scores, dtype=torch.float64))
    assert found == pytest.approx(expected) or any(abs(share - q) < 1e-9 for _, share in below)
    assert Quantile(q, halflife, warmup=len(scores) + 1).of(torch.tensor(scores)) == float("inf")


def test_a_refreshed_direction_scores_what_was_remembered() -> None:
    adapter = adapted("llama", rank=4)
    score = Score(directed(adapter), Quantile(0.5, halflife=4))
    features = torch.randn(100, sum(adapter.coordinates.values()), generator=torch.Generator().manual_seed(0))
    score.flags(features, {})
    assert torch.equal(score.state["features"], features[-32:])
    before = score.cosines(features)
    score.direction = directed(adapter, 5)
    assert not torch.allclose(before, score.cosines(features))
    _, figures = score.flags(torch.zeros(2, features.shape[1]), {})
    assert (
        figures["threshold"] == Quantile(0.5, 4).of(score.cosines(features[-32:]))
        and len(score.state["features"]) == 32
    )
    with pytest.raises(BatchError, match="nan"):
        score.flags(features * torch.nan, {})
    other = adapted("llama", rank=5)
    with pytest.raises(ArtefactError, match="other layers or another adapter"):
        score.direction = directed(other)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["ddp", "fsdp2", "model"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_ranks_equal_one(name: str, host: str, tmp_path: Path) -> None:
    found = launch("tests.methods.quarantine_ranks", name, host, directory=tmp_path)
    assert len(found) == 8
    for case, figures in found.items():
        assert figures["gap"] <= 1e-5 * figures["size"], (case, figures)


def test_in_a_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    adapter = adapted("llama", rank=4)
    kept = {n: p.detach().clone() for n, p in adapter.parameters_of("kept").items()}
    waste = {n: p.detach().clone() for n, p in adapter.parameters_of("quarantine").items()}
    given_batch = {**batch(6), "flag": torch.ones(6, dtype=torch.bool)}
    rows: Any = [{name: column[i] for name, column in given_batch.items()} for i in range(6)]
    options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=3, weight_decay=0.0, **options)
    gs.SurgeryTrainer(adapter.host, args, train_dataset=rows, method=gs.methods.quarantine(adapter)).train()
    assert all(torch.equal(p, kept[n]) for n, p in adapter.parameters_of("kept").items())
    assert all(not torch.equal(p, waste[n]) for n, p in adapter.parameters_of("quarantine").items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, at graph breaks
def test_inside_a_compiled_model() -> None:
    """Routing leaves the graph; what it gives is the same."""
    adapter, flagged = adapted("llama", rank=4), torch.tensor([True, False, True, False, False])
    _, kept, quarantined = routed(adapter, flagged, batch())
    clear(adapter)
    compiled: Any = torch.compile(adapter.host, backend="aot_eager")
    with gs.attach(gs.methods.quarantine(adapter, metrics=False), compiled) as surgery:
        surgery.backward({**batch(), "flag": flagged})
    assert gap(grads(adapter, "kept"), kept) < 1e-5 * size(kept)
    assert gap(grads(adapter, "quarantine"), quarantined) < 1e-5 * size(quarantined)


def test_bad_input() -> None:
    adapter = adapted("llama", rank=4)
    other, elsewhere = adapted("llama", rank=5), adapted("gpt_neo", rank=4)
    direction = directed(adapter)
    zero = gs.estimators.Direction(
        {k: torch.zeros_like(v) for k, v in direction.axes.items()}, direction.values, {}, {}, direction.fingerprint
    )
    make: Any = gs.methods.quarantine
    score_of: Any = Score
    cases: list[tuple[Any, type[GradsurgeryError], str]] = [
        (lambda: make(adapter.model), PlanError, "takes an adapter"),
        (lambda: make(adapter, "keep"), PlanError, "mode is"),
        (lambda: make(adapter, where=None), PlanError, "nothing flags rows"),
        (lambda: make(adapter, where=3), PlanError, "where"),
        (lambda: make(adapter, where={"encoder": "a"}), PlanError, "one column"),
        (lambda: make(adapter, clean="clean"), PlanError, "clean"),
        (lambda: make(adapter, score=direction), PlanError, "Score"),
        (lambda: make(adapter, direction=direction), PlanError, "erase"),
        (lambda: make(adapter, "erase"), PlanError, "needs direction"),
        (lambda: make(adapter, "erase", direction=zero), ArtefactError, "zero in every layer"),
        (lambda: make(adapter, "erase", direction=direction, score=Score(direction)), PlanError, "no score"),
        (lambda: score_of(zero), ArtefactError, "zero in every layer"),
        (lambda: score_of(None), PlanError, "takes a direction"),
        (lambda: score_of(direction, 2.0), PlanError, "cosine"),
        (lambda: score_of(direction, by="word"), PlanError, "by is"),
        (lambda: Quantile(1.0), PlanError, "q lies"),
        (lambda: make(other, score=Score(direction)), ArtefactError, "5"),
        (lambda: make(elsewhere, score=Score(direction)), ArtefactError, "no layer"),
        (lambda: make(other, "erase", direction=direction), ArtefactError, "5"),
        (lambda: gs.attach(make(adapter), adapter.model), PlanError, "adapter.host"),
        (
            lambda: gs.applied(adapter.host, *make(adapter).passes[0].forward_transforms).__enter__(),
            PlanError,
            "gs.mask",
        ),
        (lambda: run(adapter, make(adapter, metrics=False), batch()), BatchError, "flag"),
        (lambda: routed(adapter, torch.ones(3, dtype=torch.bool), batch()), BatchError, "3 rows"),
        (lambda: routed(adapter, torch.ones(ROWS), batch()), BatchError, "bool"),
        (
            lambda: run(adapter, make(adapter, where=None, score=Score(direction, 0.0, by="rollout")), batch()),
            BatchError,
            "rollout",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    adapter.remove()
    with pytest.raises(PlanError, match="removed"):
        gs.attach(make(adapter), adapter.host)
