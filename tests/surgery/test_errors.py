"""Bad input gives one clear error of ours, before anything of model, gradient or optimizer has changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

import gradsurgery as gs
from gradsurgery.errors import BatchError, GradsurgeryError, PlanError, SelectionError
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.mask import Mask
from tests.surgery.test_attach import traces
from tests.surgery.tiny import anatomy, batch, build, cut, forget_of, sgtm, weights


def unchanged(model: nn.Module, call: Callable[[], Any], error: type[GradsurgeryError], match: str) -> None:
    before, held = traces(model), weights(model)
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert traces(model) == before
    assert all(torch.equal(held[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def attach_under(model: nn.Module, *under: Any) -> Callable[[], Any]:
    return lambda: gs.attach(gs.Method([gs.Pass("p", under=list(under))]), model)


def test_empty_and_out_of_range_selections() -> None:
    found, model = anatomy(), build()
    empty = gs.region(model, "model.norm.weight") - gs.region(model, "model.norm.weight")
    unchanged(model, lambda: found.heads[:, 12], SelectionError, "selects nothing")
    unchanged(model, lambda: found.heads[9, :], SelectionError, "has no heads in layer 9")
    unchanged(model, lambda: gs.mask(empty), SelectionError, "is empty")
    unchanged(model, lambda: gs.freeze(empty), SelectionError, "is empty")
    unchanged(model, lambda: gs.zero(found.neurons[:, 3:3]), SelectionError, "no unit")
    unchanged(model, lambda: gs.detach(cast(Any, ~forget_of())), SelectionError, "needs units")
    unchanged(model, lambda: gs.region(model, "no.such.*"), SelectionError, "no.such")


@pytest.mark.parametrize(
    ("column", "match"),
    [
        (torch.zeros(6), "must be a bool tensor"),
        (torch.zeros(6, dtype=torch.long), "must be a bool tensor"),
        ([True] * 6, "must be a bool tensor"),
        (torch.zeros(6, 1, 1, dtype=torch.bool), "must be a bool tensor"),
        (torch.zeros(5, dtype=torch.bool), "has 5 rows, the batch has 6"),
        (torch.zeros(6, 4, dtype=torch.bool), "its rows do not fit 7 tokens"),
    ],
)
def test_labels_of_wrong_shape_or_dtype(column: Any, match: str) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.attach(sgtm(), model, optimizer) as surgery:
        unchanged(model, lambda: surgery.backward({**batch(), "forget": column}), BatchError, match)
        unchanged(model, lambda: surgery.running("train", {**batch(), "forget": column}).__enter__(), BatchError, match)
        surgery.backward(batch())


def test_batches_without_label_columns_streams_or_tensors() -> None:
    model = build()
    without = {k: v for k, v in batch().items() if k != "retain"}
    with gs.attach(sgtm(stages=False), model) as surgery:
        unchanged(
            model, lambda: surgery.backward(without), BatchError, "needs the label column 'retain'.*remove_unused"
        )
        unchanged(model, lambda: surgery.backward({}), BatchError, "nothing")
    with gs.attach(gs.Method([gs.Pass("p", stream="private")]), model) as surgery:
        unchanged(model, lambda: surgery.backward(batch()), BatchError, r"needs batch\['private'\]")
        surgery.backward({"private": batch()})
    model.zero_grad()
    with gs.attach(gs.Method([gs.Pass("p", rows="flags")]), model) as surgery:
        flags = torch.zeros(6, 7, dtype=torch.bool)
        unchanged(model, lambda: surgery.backward({**batch(), "flags": flags}), BatchError, "chooses whole examples")


def test_all_passes_are_checked_before_the_first_one_runs() -> None:
    model = build()
    with gs.attach(gs.Method([gs.Pass("a"), gs.Pass("b", rows="missing")]), model) as surgery:
        unchanged(model, lambda: surgery.backward(batch()), BatchError, "'missing'")


def test_units_of_another_model() -> None:
    other = gs.dissect(build("llama", intermediate_size=32))
    model = build()
    for transform in (gs.mask(other.heads[:, 0]), gs.zero(other.neurons[:, 0])):
        unchanged(model, attach_under(model, transform), SelectionError, "belongs to another model")
    frozen = gs.freeze(anatomy("gpt_neo").neurons[:, 0])
    unchanged(
        model, lambda: gs.attach(gs.Method([gs.Pass("p")], update=[frozen]), model), SelectionError, "another model"
    )

    def block() -> None:
        with gs.applied(model, gs.mask(other.heads[:, 0])):
            raise AssertionError("not reached")

    unchanged(model, block, SelectionError, "belongs to another model")


def test_a_region_that_covers_only_weights_that_do_not_train() -> None:
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    unchanged(model, attach_under(model, gs.mask(anatomy().neurons[0, :])), SelectionError, "no entry that trains")
    attach_under(model, gs.mask(anatomy().neurons[:, :]))().remove()


def test_a_loss_that_is_nan_is_refused_before_its_backward() -> None:
    model = build()

    def loss(outputs: Any, rows: Any, refs: Any) -> torch.Tensor:
        return gs.losses.causal_lm(outputs, rows, refs) * float("nan")

    with gs.attach(gs.Method([gs.Pass("p", loss)]), model) as surgery:
        unchanged(model, lambda: surgery.backward(batch()), BatchError, "the loss of 'p' is nan")


def test_hosts_that_cannot_work() -> None:
    model = build()
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    unchanged(model, lambda: gs.attach(sgtm(), engine), PlanError, "inside backward")
    unchanged(model, lambda: gs.attach(sgtm(), nn.DataParallel(model)), PlanError, "replicas in threads")
    optimizer = type("Zero", (torch.optim.SGD,), {"__module__": "deepspeed.zero"})(model.parameters(), lr=0.1)
    unchanged(model, lambda: gs.attach(sgtm(), model, optimizer), PlanError, "DeepSpeed")
    unchanged(model, lambda: gs.attach(gs.mask(forget_of()), model), PlanError, "takes a gs.Method")  # type: ignore[arg-type]


def test_plans_that_make_no_sense() -> None:
    region = forget_of()
    for build_plan, match in (
        (lambda: gs.Method([]), "at least one pass"),
        (lambda: gs.Method([gs.Pass("a"), gs.Pass("a")]), "different names"),
        (lambda: gs.Method([gs.Pass("a")], gradient=[cast(Any, gs.mask(region))]), "belongs to the forward stage"),
        (lambda: gs.Method([gs.Pass("a")], update=[cast(Any, gs.clip(1.0))]), "belongs to the gradient stage"),
        (lambda: gs.Method([gs.Pass("a")], gradient=[gs.clip(1.0), gs.clip(2.0)]), "must come last"),
        (lambda: gs.Method([gs.Pass("a")], update=[gs.freeze(region, unless="b")]), "names no pass"),
        (
            lambda: gs.Method([gs.Pass("a", {"x": cast(Any, len)}), gs.Pass("b", {"x": cast(Any, len)})]),
            "different names",
        ),
        (lambda: gs.Pass("a", under=[gs.clip(1.0)]), "once per optimizer step"),
        (lambda: gs.Pass("", under=[]), "needs a name"),
        (lambda: gs.Pass("a", {"x": cast(Any, len)}, into={"y": "main"}), "into names y"),
        (lambda: gs.clip(0.0), "positive finite norm"),
        (lambda: gs.scale(region, float("inf")), "finite number"),
        (lambda: gs.every(0), "positive number"),
    ):
        with pytest.raises(PlanError, match=match):
            build_plan()


def test_a_module_whose_weight_is_read_by_other_means() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.outer(x), self.inner.weight)

    model = Reads()
    with (
        pytest.raises(PlanError, match=r"inner \(Linear\) was not called"),
        gs.applied(model, gs.mask(gs.region(model, "*"))),
    ):
        model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(PlanError, match="no forward"), gs.applied(model, gs.mask(gs.region(model, "outer.*"))):
        pass


@pytest.mark.parametrize("name", ["t5", "bert", "vit"])
def test_the_next_token_loss_on_models_that_predict_something_else(name: str) -> None:
    small = {"vocab_size": 61, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        if name == "t5":
            model: Any = transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=61, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
                )
            )
        elif name == "bert":
            model = transformers.BertForMaskedLM(transformers.BertConfig(**small, intermediate_size=8))
        else:
            fields = {"image_size": 4, "patch_size": 2, "intermediate_size": 8}
            model = transformers.ViTForImageClassification(transformers.ViTConfig(**small, **fields))
    for method in (gs.methods.plain(), gs.Method([gs.Pass("p", {"x": gs.losses.causal_lm})])):
        unchanged(model, functools.partial(gs.attach, method, model), PlanError, "does not predict.*model_loss")
    with gs.attach(gs.methods.plain(gs.losses.model_loss), model) as surgery:
        if name == "t5":
            data = {key: batch()[key] for key in ("input_ids", "labels")}
            expected = float(model(**data).loss.detach())
            assert float(surgery.backward(data)["plain"]) == pytest.approx(expected, rel=0.5)
    gs.methods.plain().validate(nn.Linear(2, 2))  # of plain modules nothing is known


def test_stages_and_detach_where_nothing_trains() -> None:
    model, frozen = build(), anatomy().neurons[0, :]
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    method = gs.Method([gs.Pass("p")], update=[gs.freeze(frozen)])
    unchanged(model, lambda: gs.attach(method, model), SelectionError, "no entry that trains")
    attach_under(model, gs.detach(frozen))().remove()
    model.requires_grad_(False)
    unchanged(model, attach_under(model, gs.detach(frozen)), SelectionError, "no parameter of the model trains")


def test_an_empty_batch() -> None:
    model = build()
    with gs.attach(sgtm(stages=False), model) as surgery:
        unchanged(model, lambda: surgery.backward(cut(batch(), 0, 0)), BatchError, "no rows")


class Squares(Mask):
    traits = Traits(idempotent=True)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: gs.Pass("a", under=cast(Any, gs.mask(forget_of()))), r"under takes a list, not Mask: write \[mask\("),
        (lambda: gs.Method(cast(Any, gs.Pass("a"))), r"passes takes a list, not Pass: write \[gs\.Pass\('a'"),
        (lambda: gs.Method(cast(Any, ["a"])), r"takes gs\.Pass, not str"),
        (lambda: gs.Method([gs.Pass("a")], gradient=cast(Any, gs.clip(1.0))), r"write \[clip\(1\.0\)\]"),
        (lambda: gs.Method([gs.Pass("a")], update=cast(Any, gs.freeze(forget_of()))), "update takes a list"),
        (lambda: gs.Pass("a", loss={}), "loss takes a function"),
        (lambda: gs.Pass("a", loss=cast(Any, "causal_lm")), "loss takes a function"),
        (lambda: gs.Pass("a", loss=cast(Any, {"x": "causal_lm"})), "loss takes a function.*'x' is"),
        (lambda: gs.Pass("a", weight=float("nan")), "weight is a finite number"),
        (lambda: gs.Pass("a", weight=cast(Any, "1")), "weight is a finite number"),
        (lambda: gs.Pass("a", when=cast(Any, 3)), r"when takes gs\.every"),
        (lambda: gs.clip(cast(Any, "1")), "positive finite norm"),
        (lambda: gs.clip(float("nan")), "positive finite norm"),
        (lambda: gs.Pass("a", under=[Squares(forget_of())]), "is not linear"),
    ],
)
def test_constructors_say_what_they_take(make: Any, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        make()
