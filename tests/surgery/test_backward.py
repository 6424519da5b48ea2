"""``surgery.backward``: micro-batches add up to one batch, passes and losses go where they should, schedules count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.surgery.runner import run_of
from tests.surgery.tiny import anatomy, batch, build, cut, forget_of, gap, grads, sgtm, weights


def squared(outputs: Any, rows: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
    """Mean square of the logits over the positions that ``attention_mask`` keeps."""
    kept = rows["attention_mask"].bool()
    return outputs.logits[kept].float().square().mean()


squared.count = lambda rows: rows["attention_mask"].sum()  # type: ignore[attr-defined]


def gradient(
    method: gs.Method, parts: list[dict[str, Any]], kind: str = "llama", slot: str = "main", items: Any = "count"
) -> dict[str, Tensor]:
    model = build(kind)
    with gs.attach(method, model) as surgery:
        counted = surgery.count_items(parts) if items == "count" else items
        for part in parts:
            surgery.backward(part, num_items=counted)
        return grads(model) if slot == "main" else {n: g.clone() for n, g in surgery.slots[slot].items()}


def stock_rounding(kind: str, whole: dict[str, Tensor], sizes: list[int]) -> float:
    """What the stock model shows between one batch and its micro-batches."""
    tokens = (whole["labels"][:, 1:] != -100).sum()
    found = []
    for cuts in ([len(whole["labels"])], sizes):
        model, start = build(kind), 0
        for size in cuts:
            part = cut(whole, start, start + size)
            start += size
            inputs = {k: part[k] for k in ("input_ids", "attention_mask")}
            share = (part["labels"][:, 1:] != -100).sum() / tokens
            (gs.losses.causal_lm(model(**inputs, use_cache=False), part, {}) * share).backward()
        found.append(grads(model))
    return gap(*found)


SIZES = [1, 3, 2]


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
@pytest.mark.parametrize("strategy", ["mask", "detach", "zero"])
def test_micro_batches_add_up_to_one_batch(kind: str, strategy: str) -> None:
    method, whole = sgtm(kind, strategy, stages=False), batch()
    starts = [sum(SIZES[:k]) for k in range(len(SIZES))]
    parts = [cut(whole, a, a + n) for a, n in zip(starts, SIZES, strict=True)]
    assert gap(gradient(method, [whole], kind, items=None), gradient(method, [whole], kind)) < 1e-6
    tolerance = 10 * max(stock_rounding(kind, whole, SIZES), 1e-8)
    assert gap(gradient(method, [whole], kind), gradient(method, parts, kind)) < tolerance


METHODS = {
    "rows": lambda: gs.methods.data_filter(),
    "two passes": lambda: gs.Method([gs.Pass("a", rows="forget", weight=0.5), gs.Pass("b", rows="~forget")]),
    "two losses": lambda: gs.Method([gs.Pass("p", {"ce": gs.losses.causal_lm, "sq": squared}, weight=0.3)]),
    "the model's loss": lambda: gs.Method([gs.Pass("p", gs.losses.model_loss)]),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_is_weighted_by_its_own_items(name: str) -> None:
    method, whole = METHODS[name](), batch()
    parts = [cut(whole, 0, 1), cut(whole, 1, 3), cut(whole, 3, 6)]  # the first one has a forget row alone
    assert gap(gradient(method, [whole], items=None), gradient(method, parts)) < 1e-6


def test_one_number_of_items_serves_a_pass_over_all_rows() -> None:
    whole = batch()
    tokens = int((whole["labels"][:, 1:] != -100).sum())
    method = sgtm(stages=False)
    parts = [cut(whole, 0, 2), cut(whole, 2, 6)]
    for items in (tokens, torch.tensor(tokens), {"sgtm": tokens}):
        assert gap(gradient(method, [whole], items=None), gradient(method, parts, items=items)) < 1e-6
    with pytest.raises(BatchError, match="none for the loss 'sgtm'"):
        gradient(method, parts, items={"other": 3})


def test_rows_that_flag_nobody_send_nothing_and_report_zero() -> None:
    data = batch()
    data["forget"][:] = True
    model = build()
    with gs.attach(gs.methods.data_filter(), model) as surgery:
        losses = surgery.backward(data)
        assert losses["data_filter"] == 0.0
        assert all(not g.any() for g in grads(model).values())
        assert set(grads(model)) == {n for n, _ in model.named_parameters()}  # the graph is the same on every rank
        surgery.backward(batch(), num_items=surgery.count_items([data, batch()]))
    assert all(torch.isfinite(g).all() for g in grads(model).values())


def test_a_mixed_batch_is_the_token_weighted_sum_of_its_rows() -> None:
    """The oracle: one example at a time, under the transform that its labels ask for, weighted by its tokens."""
    whole, forget = batch(), forget_of()
    rest, structure = anatomy().rest(forget), anatomy().structure("embedding")
    model = build()
    tokens = (whole["labels"][:, 1:] != -100).sum()
    for k in range(6):
        row = cut(whole, k, k + 1)
        under = [gs.mask(rest), gs.mask(structure)] if row["forget"] else [gs.zero(forget)] if row["retain"] else []
        with gs.applied(model, *under):
            out = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"], use_cache=False)
            (gs.losses.causal_lm(out, row, {}) * (row["labels"][:, 1:] != -100).sum() / tokens).backward()
    method = gs.methods.sgtm(anatomy(), forget, embeddings="retain")
    assert gap(grads(model), gradient(method, [whole])) < 1e-6


def test_several_losses_over_one_forward_fill_their_slots() -> None:
    method = gs.Method([gs.Pass("p", {"ce": gs.losses.causal_lm, "sq": squared}, into={"ce": "main", "sq": "protect"})])
    whole, calls = batch(), []
    parts = [cut(whole, 0, 2), cut(whole, 2, 6)]
    alone = gradient(gs.Method([gs.Pass("sq", squared)]), [whole])
    assert gap(gradient(method, [whole]), gradient(gs.methods.plain(), [whole])) < 1e-7
    assert gap(gradient(method, [whole], slot="protect"), alone) < 1e-7
    assert gap(gradient(method, parts, slot="protect"), alone) < 1e-6
    model = build()
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.attach(method, model, optimizer) as surgery:
        surgery.backward(whole, backward=lambda loss, **more: loss.backward(**more))
        assert len(calls) == 1
        optimizer.step()
        with pytest.raises(gs.errors.SlotError, match="'protect' was not filled"):
            surgery.slots["protect"]


def test_a_skipped_step_does_not_leak_slots_into_the_next() -> None:
    method = gs.Method([gs.Pass("ce"), gs.Pass("sq", squared, into="protect")])
    model = build()
    with gs.attach(method, model) as surgery:
        surgery.backward(batch())
        once = {n: g.clone() for n, g in surgery.slots["protect"].items()}
        model.zero_grad()  # a scaler found inf and skipped the step
        surgery.backward(batch())
        assert gap(once, dict(surgery.slots["protect"])) == 0.0


def test_two_passes_under_their_own_transforms_accumulate() -> None:
    forget = forget_of()
    a, b = gs.Pass("a", under=[gs.mask(forget)]), gs.Pass("b", under=[gs.mask(~forget), gs.scale(forget, "1/passes")])
    whole = batch()
    both = gradient(gs.Method([a, b]), [whole])
    first, second = gradient(gs.Method([a]), [whole]), gradient(gs.Method([b]), [whole])
    for name, value in both.items():
        of = forget.of(name).mask()
        assert torch.allclose(value[~of], first[name][~of])
        assert torch.allclose(value[of], second[name][of] / 2)


def test_schedules_follow_optimizer_steps() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    once = gs.sample_one(seed=3)
    passes = [gs.Pass("third", when=gs.every(3)), gs.Pass("x", when=once), gs.Pass("y", when=once)]
    ran = []
    with gs.attach(gs.Method(passes), model, optimizer) as surgery:
        for _ in range(6):
            for part in (cut(batch(), 0, 3), cut(batch(), 3, 6)):
                names = set(surgery.backward(part))
            ran.append(names)
            optimizer.step()
            optimizer.zero_grad()
    assert [("third" in names) for names in ran] == [True, False, False, True, False, False]
    assert all(len(names & {"x", "y"}) == 1 for names in ran)
    assert set().union(*ran) == {"third", "x", "y"}


def test_finish_is_idempotent_and_backward_after_it_is_refused() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.attach(gs.Method([gs.Pass("p")], gradient=[gs.clip(1e-3)]), model, optimizer) as surgery:
        surgery.backward(batch())
        surgery.finish()
        clipped, norm = grads(model), surgery.metrics()["grad_norm"]
        assert norm > 1e-2
        assert torch.nn.utils.get_total_norm(list(clipped.values())) <= 1e-3 * (1 + 1e-5)
        surgery.finish()
        assert gap(clipped, grads(model)) == 0.0
        assert surgery.metrics()["grad_norm"] == norm
        with pytest.raises(PlanError, match="has run"):
            surgery.backward(batch())
        before = weights(model)
        optimizer.step()
        for name, value in before.items():
            assert torch.allclose(model.get_parameter(name), value - 0.1 * clipped[name])
        optimizer.zero_grad()
        surgery.backward(batch())
        surgery.finish()
        optimizer.zero_grad()  # the step was given up
        surgery.backward(batch())
        optimizer.step()
        assert surgery.step == 2


def test_metrics_are_means_over_the_window() -> None:
    whole = batch()
    parts = [cut(whole, 0, 1), cut(whole, 1, 6)]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gs.attach(sgtm(stages=False), model, optimizer) as surgery:
        expected = float(surgery.backward(whole)["sgtm"])
        assert surgery.metrics()["loss/sgtm"] == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        items = surgery.count_items(parts)
        for part in parts:
            surgery.backward(part, num_items=items)
        assert surgery.metrics()["loss/sgtm"] == pytest.approx(expected, rel=1e-6)
        surgery.track(first=gs.region(model, "model.layers.0.*"))
        optimizer.step()
        assert surgery.metrics()["grad_norm/first"] > 0


def test_clip_does_not_count_frozen_entries() -> None:
    frozen = anatomy().neurons[:, :10]
    model, free = build(), build()
    for p in (model, free):
        assert p.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gs.attach(
        gs.Method([gs.Pass("p")], gradient=[gs.clip(0.5)], update=[gs.freeze(frozen)]), model, optimizer
    ) as surgery:
        surgery.backward(batch())
        optimizer.step()
        norm = surgery.metrics()["grad_norm"]
    with gs.attach(gs.methods.plain(), free) as surgery:
        surgery.backward(batch())
    squares = sum(float(g[~frozen.of(n).mask()].double().square().sum()) for n, g in grads(free).items())
    assert norm == pytest.approx(squares**0.5, rel=1e-5)
    assert norm < float(torch.nn.utils.get_total_norm(list(grads(free).values())))


def test_refs_are_evaluated_plain_in_eval_mode() -> None:
    seen: dict[str, Any] = {}

    def reference(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        seen["training"], seen["grad"] = model.training, torch.is_grad_enabled()
        return model(**inputs).logits

    def distance(outputs: Any, rows: Any, refs: Mapping[str, Any]) -> Tensor:
        seen["differs"] = not torch.equal(outputs.logits, refs["plain"])
        return (outputs.logits - refs["plain"]).square().mean()

    model = build()
    method = gs.Method([gs.Pass("p", distance, under=[gs.zero(forget_of())], refs={"plain": reference})])
    with gs.attach(method, model) as surgery:
        surgery.backward(batch())
    assert seen == {"training": False, "grad": False, "differs": True}
    assert model.training


def test_a_method_without_a_main_gradient_accumulates_its_slot() -> None:
    method, whole = gs.Method([gs.Pass("a", into="protect")]), batch()
    model = build()
    with gs.attach(method, model) as surgery:
        surgery.backward(whole)
        once = {n: g.clone() for n, g in surgery.slots["protect"].items()}
        surgery.backward(whole)
        assert gap({n: 2 * g for n, g in once.items()}, dict(surgery.slots["protect"])) < 1e-6
        assert grads(model) == {}


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_of_the_bound_optimizer_ends_the_window(to_none: bool) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    passes = [gs.Pass("ce", when=gs.every(1)), gs.Pass("sq", squared, into="protect")]
    with gs.attach(gs.Method(passes, gradient=[gs.clip(1.0)]), model, optimizer) as surgery:
        surgery.backward(batch())
        once = {n: g.clone() for n, g in surgery.slots["protect"].items()}
        surgery.finish()
        optimizer.zero_grad(set_to_none=to_none)  # the step was given up
        assert not surgery.slots
        surgery.backward(batch())
        assert gap(once, dict(surgery.slots["protect"])) == 0.0
        optimizer.step()
        assert surgery.step == 1


def test_schedules_need_an_optimizer_to_count_by() -> None:
    model = build()
    method = gs.Method([gs.Pass("a"), gs.Pass("b", when=gs.every(3))])
    method.dry_run(model, batch())
    with gs.attach(method, model) as surgery:
        with pytest.raises(PlanError, match=r"of 'b' counts optimizer steps.*bind"):
            surgery.backward(batch())
        assert grads(model) == {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgery.bind(optimizer)
        surgery.backward(batch())


def test_equal_schedules_are_one() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.attach(gs.Method([gs.Pass(n, when=gs.sample_one(0)) for n in "ab"]), model, optimizer) as surgery:
        assert len(surgery.backward(batch())) == 1


def test_a_batch_tells_hooks_its_shape() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert run_of({}, 1, {"pixel_values": torch.zeros(2, 3, 4, 4)}).shape is None
    assert run_of({}, 1, {"input_ids": ids}).shape == (2, 5)
    assert run_of({}, 1, {"input_ids": ids, "labels": ids[:, :3]}).shape is None  # an encoder's length and a decoder's


def test_a_pass_that_fails_after_others_ran_leaks_nothing_into_the_next_try() -> None:
    armed = [True]

    def loss(outputs: Any, rows: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
        if armed.pop():
            raise RuntimeError("burst")
        return squared(outputs, rows, refs)

    model = build()
    passes = [gs.Pass("ce"), gs.Pass("sq", squared, into="protect"), gs.Pass("last", loss)]
    with gs.attach(gs.Method(passes), model) as surgery:
        with pytest.raises(RuntimeError, match="burst"):
            surgery.backward(batch())
        once = {n: g.clone() for n, g in surgery.slots["protect"].items()}
        model.zero_grad()
        armed.append(False)
        surgery.backward(batch())
        assert gap(once, dict(surgery.slots["protect"])) == 0.0
