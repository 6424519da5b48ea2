"""WaRP, GPM, ActSVD and their baselines: what each keeps, by its paper's formula, on several architectures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, PlanError, SelectionError
from gradsurgery.estimators.importance import rotated
from tests.surgery.tiny import batch, build, weights
from tests.transforms.cases import case
from tests.transforms.test_rotate import OPTIMIZERS, loss_of, natural, run

ARCHITECTURES = ["llama", "gpt2", "vit", "mixtral"]
estimators: Any = gs.estimators
methods: Any = gs.methods
step: Any = [gs.Pass("p", loss_of)]


def moved_by(here: Any, method: gs.Method, optimizer: Any = torch.optim.SGD) -> tuple[Any, dict[str, Tensor]]:
    """A model after one step, and how far each weight moved."""
    model = here.copy()
    before = weights(model)
    used = optimizer(model.parameters(), lr=0.1)
    with gs.attach(method, model, used) as surgery:
        run(surgery, used, [here.batch])
    return model, {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_column_mask_is_gpm(name: str) -> None:
    here = case(name)
    basis = estimators.activation_basis(here.model, [here.batch])
    _, plain = moved_by(here, gs.Method(step))
    _, found = moved_by(here, methods.gpm(basis, energy=0.95, passes=step))
    columns = {}
    for n in basis:
        m = basis[n][..., : max(basis.rank(n, 0.95), 1)]  # GPM's M: the directions that reach the energy
        update = natural(basis, n, plain[n])
        wanted = update - update @ m @ m.mT  # algorithm 1, line 8
        torch.testing.assert_close(
            natural(basis, n, found[n]), wanted, rtol=1e-6, atol=1e-6 * float(update.abs().max())
        )
        columns[n.removesuffix(".weight")] = torch.arange(basis.width(n)) < m.shape[-1]  # a layer's name will do
    _, masked = moved_by(here, methods.warp(basis, columns, passes=step))
    for n in basis:
        torch.testing.assert_close(masked[n], found[n], rtol=1e-6, atol=1e-6 * float(plain[n].abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_mask_of_left_vectors_is_actsvd(name: str) -> None:
    here = case(name)
    basis = estimators.activation_basis(here.model, [here.batch], side="output")
    _, plain = moved_by(here, gs.Method(step))
    _, found = moved_by(here, methods.actsvd(basis, k=3, passes=step))
    rows = {}
    for n in basis:
        v = basis[n][..., :3]
        update = natural(basis, n, plain[n])
        wanted = update - v @ v.mT @ update
        torch.testing.assert_close(
            natural(basis, n, found[n]), wanted, rtol=1e-6, atol=1e-6 * float(update.abs().max())
        )
        rows[n] = torch.arange(basis.width(n)) < 3
    _, masked = moved_by(here, methods.warp(basis, rows, passes=step))
    for n in basis:
        torch.testing.assert_close(masked[n], found[n], rtol=1e-6, atol=1e-6 * float(plain[n].abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_of_protected_inputs_stay_under_gpm(name: str) -> None:
    """With every direction of the old inputs kept, the layers that read them first compute what they did."""
    here = case(name)
    basis = estimators.activation_basis(here.model, [here.batch])
    first = next(iter(basis))
    _, moved = moved_by(here, methods.gpm(basis, energy=1.0, passes=step))
    u, s = basis[first], basis.spectrum(first)
    reached = u[..., : int((s > 1e-12).sum(-1).max())]
    assert natural(basis, first, moved[first]).abs().max() > 0 or reached.shape[-1] == u.shape[-1]
    assert (natural(basis, first, moved[first]) @ reached).abs().max() <= 1e-9


@pytest.mark.parametrize("others", ["train", "freeze"])
def test_what_else_learns(others: Any) -> None:
    model = build()
    basis = estimators.activation_basis(model, [batch()], "mlp")
    scores = estimators.importance(model, basis, [batch()])
    before = weights(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with gs.attach(methods.warp(basis, scores, ratio=0.2, others=others), model, optimizer) as surgery:
        run(surgery, optimizer, [batch(seed=k) for k in range(3)])
    masks = estimators.top_k(scores, 0.2)
    for n, p in model.named_parameters():
        if n not in basis.sites:
            assert torch.equal(p, before[n]) == (others == "freeze"), n
        else:
            gap = rotated(basis, n, p) - rotated(basis, n, before[n])
            assert (gap * masks[n]).norm() <= 1e-6 * before[n].norm() and (gap * ~masks[n]).norm() > 1e-3


def test_what_the_first_task_needs_and_the_second_does_not() -> None:
    model = build()
    basis = estimators.activation_basis(model, [batch()], "mlp")
    first, second = (estimators.top_k(estimators.importance(model, basis, [batch(seed=seed)]), 0.3) for seed in (0, 1))
    assert 0 < (first - second).count() < first.count() < (first | second).count()
    for masks in (first - second, first | second, first & second):
        fresh = build()
        before = weights(fresh)
        optimizer = OPTIMIZERS["adamw"](fresh.parameters())
        with gs.attach(methods.warp(basis, masks), fresh, optimizer) as surgery:
            run(surgery, optimizer, [batch(seed=2)] * 3)
        for n in basis:
            gap = rotated(basis, n, fresh.get_parameter(n)) - rotated(basis, n, before[n])
            assert (gap * masks[n]).norm() <= 1e-6 * before[n].norm() and (gap * ~masks[n]).norm() > 1e-3


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_original_space_mask_is_exact(scope: Any) -> None:
    model = build()
    scores = estimators.importance(model, estimators.identity_basis(model), [batch()])
    masks = estimators.top_k(scores, 0.1, scope)
    before = weights(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with gs.attach(methods.original_space_mask(scores, 0.1, scope), model, optimizer) as surgery:
        run(surgery, optimizer, [batch(seed=k) for k in range(3)])
    for n in masks:
        p = model.get_parameter(n)
        assert torch.equal(p[masks[n]], before[n][masks[n]])
        assert not torch.equal(p, before[n])


def test_lora_factors_are_weights_like_others() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, init_lora_weights=False)
    model = peft.get_peft_model(build(), config)
    basis = estimators.activation_basis(model, [batch()], ["*lora_A*", "*lora_B*"])
    assert len(basis) == 8
    scores = estimators.importance(model, basis, [batch()])
    masks = estimators.top_k(scores, 0.2)
    before = weights(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with gs.attach(methods.warp(basis, masks), model, optimizer) as surgery:
        run(surgery, optimizer, [batch(seed=k) for k in range(3)])
    for n in basis:
        gap = rotated(basis, n, model.get_parameter(n)) - rotated(basis, n, before[n])
        assert (gap * masks[n]).norm() <= 1e-6 * before[n].norm() and (gap * ~masks[n]).norm() > 1e-4
    whole = estimators.activation_basis(model, [batch()], "base_layer")
    with pytest.raises(SelectionError, match="holds no entry that trains"):
        methods.gpm(whole).validate(model)


def test_tied_weights_keep_their_coordinates_under_both_names() -> None:
    model = build(tie_word_embeddings=True)
    basis = estimators.activation_basis(model, [batch()], "lm_head", top_k=5)
    before = weights(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with gs.attach(methods.gpm(basis, energy=None), model, optimizer) as surgery:
        run(surgery, optimizer, [batch(seed=k) for k in range(3)])
    (name,) = basis.sites
    assert model.lm_head.weight is model.get_parameter(name)
    assert (rotated(basis, name, model.lm_head.weight - before[name])).norm() <= 1e-6 * before[name].norm()


def test_mixing_is_two_passes() -> None:
    model = build()
    alone = weights(model)
    total = {n: torch.zeros_like(p) for n, p in alone.items()}
    for seed, weight in ((0, 0.75), (1, 0.25)):
        with gs.attach(gs.methods.plain(), model) as surgery:
            surgery.backward(batch(seed=seed))
        for n, p in model.named_parameters():
            total[n] += weight * p.grad  # type: ignore[arg-type]
            p.grad = None
    with gs.attach(methods.mixed(0.25), model) as surgery:
        surgery.backward({"task": batch(seed=0), "protected": batch(seed=1)})
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, total[n])


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "rotation.md").read_text(encoding="utf-8")
    plain = [{k: v for k, v in batch(seed=k).items() if k not in ("forget", "retain")} for k in range(2)]
    names: dict[str, Any] = {"model": build(), "protected": plain, "loader": plain}
    before = {n: p.clone() for n, p in names["model"].named_parameters()}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    assert any(not torch.equal(p, before[n]) for n, p in names["model"].named_parameters())
    for name in re.findall(r"`([a-z_]+)\(", page):
        assert hasattr(gs.methods, name), name


def quantised_like(model: nn.Module) -> nn.Module:
    """A model whose first down projection says that it is packed, as bitsandbytes' 8-bit weights do."""
    weight: Any = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    weight.SCB = torch.ones(24)
    return model


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "missing layers": (lambda m, b: methods.warp(b, {next(iter(b)): torch.ones(1, 1).bool()}), SelectionError, "lack"),
    "empty masks": (
        lambda m, b: methods.warp(b, {name: torch.zeros(1, 1).bool() for name in b}),
        SelectionError,
        "name no coordinate",
    ),
    "no importances": (lambda m, b: methods.warp(b, 0.1), PlanError, "takes importances or masks"),
    "another basis": (
        lambda m, b: methods.warp(b, estimators.importance(m, estimators.identity_basis(m, "mlp"), [batch()])),
        ArtefactError,
        "made in another basis",
    ),
    "others": (
        lambda m, b: methods.warp(b, estimators.importance(m, b, [batch()]), others="half"),
        PlanError,
        "others is",
    ),
    "input for actsvd": (lambda m, b: methods.actsvd(b), PlanError, 'side="output"'),
    "energy": (lambda m, b: methods.gpm(b, energy=1.5), PlanError, "energy is a share"),
    "no spectrum": (lambda m, b: methods.gpm(estimators.identity_basis(m), 0.9), PlanError, "no spectrum"),
    "rotated": (
        lambda m, b: methods.original_space_mask(estimators.importance(m, b, [batch()])),
        PlanError,
        "identity_basis",
    ),
    "mixing": (lambda m, b: methods.mixed(1.0), PlanError, "between 0 and 1"),
    "quantised, basis": (
        lambda m, b: estimators.activation_basis(quantised_like(m), [batch()]),
        PlanError,
        "quantised",
    ),
    "quantised, importance": (
        lambda m, b: estimators.importance(quantised_like(m), b, [batch()]),
        PlanError,
        "quantised",
    ),
    "quantised, rotate": (lambda m, b: gs.attach(methods.gpm(b), quantised_like(m)), PlanError, "quantised"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence(name: str) -> None:
    call, error, message = BAD[name]
    model = build()
    basis = estimators.activation_basis(model, [batch()], "mlp")
    with pytest.raises(error, match=message):
        call(model, basis)
