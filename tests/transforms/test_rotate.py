"""Rotated freezes, masks and scales against the formula; signed permutations and empty masks; sharding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError
from gradsurgery.estimators import Basis, Masks
from gradsurgery.estimators.importance import rotated
from tests.engines.test_ranks import launch
from tests.surgery.test_freeze import OPTIMIZERS
from tests.surgery.tiny import batch, build, weights
from tests.transforms.cases import Case, case

ARCHITECTURES = ["llama", "gpt2", "mixtral", "gpt_oss", "vit", "t5"]
few = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
estimators: Any = gs.estimators


def loss_of(outputs: Any, rows: Any, refs: Any) -> Tensor:
    return outputs["logits"].tanh().square().mean()


loss_of.takes_labels = False  # type: ignore[attr-defined]


def attached(model: Any, optimizer: Any, update: Any = (), gradient: Any = (), loss: Any = loss_of) -> gs.Surgery:
    return gs.attach(gs.Method([gs.Pass("p", loss)], gradient=gradient, update=update), model, optimizer)


def run(surgery: gs.Surgery, optimizer: Any, batches: list[dict[str, Any]]) -> None:
    for rows in batches:
        surgery.backward(rows)
        optimizer.step()
        optimizer.zero_grad()


def natural(basis: Basis, name: str, tensor: Tensor) -> Tensor:
    return basis.sites[name].layout.matrices(tensor)


def masked(basis: Basis, name: str, tensor: Tensor, mask: Tensor) -> Tensor:
    """``[(X U) o M] U^T``, as a tensor of the weight's shape."""
    u, x = basis[name].to(tensor.dtype), natural(basis, name, tensor)
    inside = ((x @ u) * mask) @ u.mT if basis.side == "input" else u @ ((u.mT @ x) * mask)
    return basis.sites[name].layout.weight(inside, tuple(tensor.shape))


@st.composite
def coordinates(draw: st.DrawFn, here: Case, side: Any = None) -> gs.Coordinates:
    """Random orthonormal bases of some weights, complete or not, and masks of any form; some may be empty."""
    torch.manual_seed(draw(st.integers(0, 999)))
    side = side or draw(st.sampled_from(["input", "output"]))
    made = estimators.activation_basis(here.model, [here.batch], side=side)
    vectors = {}
    for key, found in made.vectors.items():
        q = torch.linalg.qr(torch.randn_like(found)).Q
        vectors[key] = q[..., : draw(st.integers(1, q.shape[-1]))] if draw(st.booleans()) else q
    basis = Basis(made.space, side, made.sites, vectors)
    if draw(st.integers(0, 4)) == 0:
        return gs.Coordinates(basis)
    masks = {}
    for name in draw(st.lists(st.sampled_from(list(basis.sites)), min_size=1, unique=True)):
        shape = basis.rotated_shape(name)
        form = draw(st.sampled_from(["entry", "row", "column", "stack", "none", "all"]))
        shape = (
            (*shape[:-1], 1) if form == "row" else (*[1] * (len(shape) - 1), shape[-1]) if form == "column" else shape
        )
        shape = (*shape[:-2], 1, shape[-1]) if form == "stack" else shape
        level = {"none": 0.0, "all": 1.0}.get(form, 0.4)
        masks[name] = torch.rand(shape) < level
    return gs.Coordinates(basis, masks)


def mask_of(chosen: gs.Coordinates, name: str) -> Tensor:
    if name not in chosen.names:
        return torch.zeros(chosen.basis.rotated_shape(name))
    if chosen.masks is None:
        return torch.ones(chosen.basis.rotated_shape(name))
    return chosen.masks[name].expand(chosen.basis.rotated_shape(name)).double()


@pytest.mark.parametrize("name", ARCHITECTURES)
@few
@given(st.data())
def test_the_update_and_the_gradient_by_the_formula(name: str, data: st.DataObject) -> None:
    here = case(name)
    chosen = data.draw(coordinates(here))
    basis, start = chosen.basis, weights(here.model)
    factor = data.draw(st.sampled_from([0.0, 0.5, -0.75, 2.0]))
    transforms: dict[str, tuple[Any, Any, float]] = {
        "freeze": ([gs.rotate(basis, gs.freeze(chosen))], [], 0.0),
        "freeze, and the gradient": ([gs.rotate(basis, gs.freeze(chosen), gradient=True)], [], 0.0),
        "scale at the update": ([gs.rotate(basis, gs.scale(chosen, factor), at="update")], [], factor),
        "scale": ([], [gs.rotate(basis, gs.scale(chosen, factor))], factor),
        "mask": ([], [gs.rotate(basis, gs.mask(chosen))], 0.0),
        "freeze at the gradient": ([], [gs.rotate(basis, gs.freeze(chosen), at="gradient")], 0.0),
    }
    plain = here.copy()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with attached(plain, optimizer) as surgery:
        run(surgery, optimizer, [here.batch])
    for kind, (update, gradient, left) in transforms.items():
        model = here.copy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attached(model, optimizer, update, gradient) as surgery:
            run(surgery, optimizer, [here.batch])
        for n, p in model.named_parameters():
            moved = dict(plain.named_parameters())[n].detach() - start[n]
            if n in basis.sites:
                moved = moved - (1 - left) * masked(basis, n, moved, mask_of(chosen, n))
            # some architectures compute norms in fp32: a step's gradient is reproduced to that
            gap = float((p.detach() - start[n] - moved).abs().max())
            assert gap <= 1e-9 * float(start[n].abs().max()) + 1e-6 * float(moved.abs().max()), (kind, n, gap)


@pytest.mark.parametrize("name", ["adamw", "adamw foreach", "adamw fused", "sgd momentum", "adafactor torch"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_frozen_coordinates_stay_through_a_hundred_steps(name: str, side: Any) -> None:
    model = build(hidden_size=48, intermediate_size=64)
    basis = estimators.activation_basis(model, [batch()], side=side)
    scores = estimators.importance(model, basis, [batch()])
    masks = estimators.top_k(scores, 0.1)
    optimizer = OPTIMIZERS[name](model.parameters())
    with gs.attach(gs.methods.plain(), model, optimizer) as surgery:
        run(surgery, optimizer, [batch(seed=99)])  # moments are not zero
    before = {n: rotated(basis, n, model.get_parameter(n).double()) for n in basis}
    with gs.attach(gs.methods.warp(basis, masks), model, optimizer) as surgery:
        run(surgery, optimizer, [batch(seed=k % 7) for k in range(100)])
    for n, was in before.items():
        now, mask = rotated(basis, n, model.get_parameter(n).double()), masks[n]
        assert ((now - was) * mask).norm() <= 1e-6 * (was * mask).norm(), n
        assert ((now - was) * ~mask).norm() > 1e-2 * was.norm()


def test_in_half_precision_frozen_coordinates_stay_to_one_rounding() -> None:
    model = build(hidden_size=48, intermediate_size=64).to(torch.bfloat16)
    basis = estimators.activation_basis(model, [batch()]).top(12)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = {n: rotated(basis, n, model.get_parameter(n).double()) for n in basis}
    gaps = []
    with gs.attach(gs.methods.gpm(basis, energy=None), model, optimizer) as surgery:
        for steps in (1, 60):
            run(surgery, optimizer, [batch(seed=k % 7) for k in range(steps)])
            now = {n: rotated(basis, n, model.get_parameter(n).double()) for n in basis}
            gaps.append(max(float((now[n] - was).norm() / was.norm()) for n, was in before.items()))
    assert gaps[1] <= max(2 * gaps[0], 2**-8)  # the rounding of the weights themselves, and it does not add up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_empty_mask_is_no_basis(name: str, dtype: torch.dtype) -> None:
    here = case(name, dtype if dtype == torch.float32 else torch.float32)
    found = []
    for rotates in (False, True):
        model = here.copy().to(dtype)
        rows = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in here.batch.items()}
        basis = estimators.activation_basis(model, [rows])
        empty = {n: torch.zeros(basis.rotated_shape(n)).bool() for n in basis}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        update = [gs.rotate(basis, gs.freeze(gs.Coordinates(basis, empty)), gradient=True)] if rotates else []
        gradient = [gs.rotate(basis, gs.mask(gs.Coordinates(basis, empty)))] if rotates else []
        with attached(model, optimizer, update, [*gradient, gs.clip(1.0)]) as surgery:
            run(surgery, optimizer, [rows] * 3)
        found.append(weights(model))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def signed_permutation(size: int, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
    return torch.eye(size)[:, torch.randperm(size, generator=generator)] * signs


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        ("vit", torch.float32),
        pytest.param("mixtral", torch.float32, marks=pytest.mark.slow),  # its entries take long to write down
    ],
)
@few
@given(seed=st.integers(0, 99), side=st.sampled_from(["input", "output"]))
def test_a_signed_permutation_is_the_plain_freeze(name: str, dtype: torch.dtype, seed: int, side: str) -> None:
    here = case(name, torch.float32)
    rows = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in here.batch.items()}
    model, other = here.copy().to(dtype), here.copy().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    made = estimators.activation_basis(model, [rows], side=side)
    vectors = {}
    for key, found in made.vectors.items():
        stacks = [
            signed_permutation(found.shape[-1], generator) for _ in range(found.shape[0] if found.dim() == 3 else 1)
        ]
        vectors[key] = torch.stack(stacks) if found.dim() == 3 else stacks[0]
    basis = Basis(made.space, side, made.sites, vectors)  # type: ignore[arg-type]
    masks, entries = {}, {}
    for n in basis.sites:
        rows_, cols = basis.rotated_shape(n)[-2:]
        # few distinct rows, so that the plain region is small to write down
        mask = torch.rand((*basis.rotated_shape(n)[:-2], 1, cols), generator=generator) < 0.3
        masks[n] = mask.expand(basis.rotated_shape(n)).clone()
        masks[n][..., rows_ // 2 :, :] = False
        own = masked(basis, n, torch.ones(basis.space.shapes[n]), torch.ones(())) * 0
        own = (
            basis.sites[n]
            .layout.weight(
                (masks[n].float() @ vectors[basis.sites[n].key].abs().mT)
                if side == "input"
                else vectors[basis.sites[n].key].abs() @ masks[n].float(),
                tuple(basis.space.shapes[n]),
            )
            .bool()
        )
        entries[n] = own
    region = gs.Region(basis.space, {n: entries_of(own) for n, own in entries.items()})
    for each, update in (
        (model, gs.rotate(basis, gs.freeze(gs.Coordinates(basis, masks)))),
        (other, gs.freeze(region)),
    ):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.1)
        with attached(each, optimizer, [update], [gs.clip(0.5)]) as surgery:
            run(surgery, optimizer, [rows] * 3)
    frozen = {n: own for n, own in entries.items() if own.any()}
    assert frozen
    for n, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(n)), n
        if n in frozen:
            assert torch.equal(p[frozen[n]], here.model.get_parameter(n).to(dtype)[frozen[n]])


def entries_of(mask: Tensor) -> Any:
    from gradsurgery.anatomy.entries import Entries

    out = Entries.empty(tuple(mask.shape))
    for row in range(len(mask)):
        if mask.dim() == 2:
            out = out | Entries.box(tuple(mask.shape), {0: [row], 1: mask[row].nonzero().flatten().numpy()})
        else:
            for index in mask[row].nonzero().tolist():
                out = out | Entries.box(tuple(mask.shape), {0: [row], **{d + 1: [i] for d, i in enumerate(index)}})
    return out


def test_unless_disabled_and_weights_that_somebody_else_moves() -> None:
    model = build()
    basis = estimators.activation_basis(model, [batch()], top_k=4)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    update = [gs.rotate(basis, gs.freeze(gs.Coordinates(basis), unless="b"))]
    method = gs.Method([gs.Pass("a"), gs.Pass("b", when=gs.every(2))], update=update)

    def moved(before: dict[str, Tensor]) -> float:
        gaps = [(rotated(basis, n, model.get_parameter(n) - before[n])).norm() / before[n].norm() for n in basis]
        return float(max(gaps))

    with gs.attach(method, model, optimizer) as surgery:
        for k in range(4):
            before = weights(model)
            run(surgery, optimizer, [batch(seed=k)])
            assert (moved(before) > 1e-3) == (k % 2 == 0)
        for loads in (False, True):
            with surgery.disabled():
                run(surgery, optimizer, [batch(), batch()])
            if loads:
                model.load_state_dict({n: p + 0.05 * torch.randn_like(p) for n, p in model.state_dict().items()})
            before = weights(model)
            surgery._stepper.step = 1
            run(surgery, optimizer, [batch()])
            assert moved(before) < 1e-6  # neither the disabled step nor the loaded weights are taken back


def test_weights_without_a_gradient_are_left_alone() -> None:
    model = build()
    basis = estimators.activation_basis(model, [batch()])
    for n, p in model.named_parameters():
        p.requires_grad_("layers.1" in n)
    before = weights(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with gs.attach(gs.methods.gpm(basis, 0.5), model, optimizer) as surgery:
        run(surgery, optimizer, [batch(seed=k) for k in range(3)])
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != ("layers.1" in n)


def test_convolutions_whose_memory_is_not_contiguous() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 36, 2)
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(plain)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    x = torch.randn(8, 3, 10, 10)
    out = []
    for memory in (torch.contiguous_format, torch.channels_last):
        model = Net().to(memory_format=memory)  # type: ignore[call-overload]
        basis = estimators.activation_basis(model, [{"x": x}])
        assert {site.layout.kind for site in basis.sites.values()} == {"conv", "linear"}
        before = {n: rotated(basis, n, model.get_parameter(n)) for n in basis}
        optimizer = OPTIMIZERS["sgd momentum"](model.parameters())
        with gs.attach(gs.methods.gpm(basis, 0.9, passes=[gs.Pass("p", loss_of)]), model, optimizer) as surgery:
            run(surgery, optimizer, [{"x": x}] * 5)
        for n, was in before.items():
            k = max(basis.rank(n, 0.9), 1)
            now = rotated(basis, n, model.get_parameter(n))
            assert (now - was)[..., :k].norm() <= 1e-6 * was.norm() and (now - was).norm() > 1e-3 * was.norm()
        out.append(weights(model))
    for n in out[0]:
        torch.testing.assert_close(out[0][n], out[1][n], rtol=1e-3, atol=1e-5)


def test_two_ranks_under_fsdp_equal_one(tmp_path: Path) -> None:
    results = launch("tests.transforms.rotate_ranks", directory=tmp_path)
    assert len(results) == 9
    for name, found in results.items():
        assert found["gap"] <= 1e-8, (name, found)  # AdamW's first steps are signs, of float64 gradients
        assert found["stock"] <= 1e-8
        assert found["moved"] > 1e-4


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class TestReparametrised:
    @pytest.mark.parametrize("side", ["input", "output"])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_starts_as_the_model_and_folds_back(self, name: str, side: str) -> None:
        here = case(name, torch.float32)
        model = here.copy()
        basis = estimators.activation_basis(model, [here.batch], side=side)
        before, names = weights(model), list(model.state_dict())
        own = dict(model.named_parameters())
        classes = {n: type(m) for n, m in model.named_modules()}
        outputs = here.outputs(model)
        with pytest.raises(KeyError), gs.reparametrised(model, basis) as turned:
            assert set(turned) == set(basis.sites) and len(list(model.parameters())) == len(own)
            gap = (here.outputs(model) - outputs).norm() / outputs.norm()
            assert gap <= 2e-5  # what 1e-6 of every weight does to the outputs
            raise KeyError
        assert list(model.state_dict()) == names
        assert {n: type(m) for n, m in model.named_modules()} == classes
        for n, p in model.named_parameters():
            assert p is own[n] and (p - before[n]).norm() <= 1e-6 * before[n].norm()

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit"])
    @few
    @given(st.data())
    def test_under_sgd_it_is_the_update_form(self, name: str, data: st.DataObject) -> None:
        here = case(name)
        side = data.draw(st.sampled_from(["input", "output"]))
        basis = estimators.activation_basis(here.model, [here.batch], side=side)
        torch.manual_seed(data.draw(st.integers(0, 99)))
        masks = {n: torch.rand(basis.rotated_shape(n)) < 0.4 for n in basis}
        one, two = here.copy(), here.copy()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        with attached(one, optimizer, [gs.rotate(basis, gs.freeze(gs.Coordinates(basis, masks)))]) as surgery:
            run(surgery, optimizer, [here.batch] * 3)
        with gs.reparametrised(two, basis, masks):
            optimizer = torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
            for _ in range(3):
                loss_of(two(**here.batch), None, None).backward()
                optimizer.step()
                optimizer.zero_grad()
        for n, p in one.named_parameters():
            torch.testing.assert_close(p, two.get_parameter(n), rtol=1e-5, atol=1e-7)

    def test_frozen_coordinates_stay_whatever_the_optimizer_does(self) -> None:
        model = build()
        basis = estimators.activation_basis(model, [batch()])
        masks = estimators.top_k(estimators.importance(model, basis, [batch()]), 0.3)
        before = {n: rotated(basis, n, model.get_parameter(n)) for n in basis}
        rows = {k: v for k, v in batch().items() if k not in ("forget", "retain")}
        with gs.reparametrised(model, basis, masks):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
            for _ in range(20):
                model(**rows).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        for n, was in before.items():
            now = rotated(basis, n, model.get_parameter(n))
            assert ((now - was) * masks[n]).norm() <= 1e-6 * was.norm()
            assert (now - was).norm() > 1e-2 * was.norm()

    def test_half_precision_goes_there_and_back_to_the_rounding_of_fp32(self) -> None:
        model = build(hidden_size=48).to(torch.bfloat16)
        basis = estimators.activation_basis(model, [batch()])
        before = weights(model)
        with gs.reparametrised(model, basis) as turned:
            assert {p.dtype for p in turned.values()} == {torch.float32}
            model(input_ids=batch()["input_ids"])
        for n, p in model.named_parameters():
            assert (p.float() - before[n].float()).norm() <= 1e-6 * before[n].float().norm()
            # entries a thousandth of their row: the rounding of the row in fp32 reaches their bits
            assert float((p != before[n]).float().mean()) < 1e-3

    def test_what_cannot_be_is_refused_before_anything_changes(self) -> None:
        model = build()
        basis = estimators.activation_basis(model, [batch()])
        with pytest.raises(PlanError, match="without top_k"), gs.reparametrised(model, basis.top(4)):
            pass
        with pytest.raises(SelectionError, match="another model"), gs.reparametrised(build("gpt_neo"), basis):
            pass
        shared = tied()
        both = Basis(
            gs.estimators.identity_basis(shared).space,
            "input",
            estimators.identity_basis(shared).sites,
            {"0.weight": None},
        )
        with pytest.raises(PlanError, match="shared by 2 layers"), gs.reparametrised(shared, both):
            pass
        assert list(model.state_dict()) == list(build().state_dict())


rotate: Any = gs.rotate
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "entries": (lambda b: rotate(b, gs.freeze(b.region)), PlanError, r"gs.freeze\(gs.Coordinates"),
    "zero": (lambda b: rotate(b, gs.clip(1.0)), PlanError, "takes gs.freeze, gs.mask or gs.scale"),
    "no basis": (lambda b: rotate(None, gs.freeze(b.region)), PlanError, "takes a basis first"),
    "another basis": (lambda b: gs.rotate(b.top(2), gs.freeze(gs.Coordinates(b))), PlanError, "another basis"),
    "where": (lambda b: gs.rotate(b, gs.mask(gs.Coordinates(b), "forget")), PlanError, "where"),
    "factor": (lambda b: gs.rotate(b, gs.scale(gs.Coordinates(b), "1/passes")), PlanError, "takes a number"),
    "stage": (lambda b: rotate(b, gs.mask(gs.Coordinates(b)), at="forward"), PlanError, "at is"),
    "unless": (
        lambda b: gs.rotate(b, gs.freeze(gs.Coordinates(b), unless="p"), at="gradient"),
        PlanError,
        "update stage",
    ),
    "coordinates alone, at the update": (
        lambda b: gs.Method([gs.Pass("p")], update=[gs.freeze(gs.Coordinates(b))]).validate(build()),
        PlanError,
        r"put what acts on them into gs.rotate",
    ),
    "coordinates alone, in a pass": (
        lambda b: gs.Method([gs.Pass("p", under=[gs.mask(gs.Coordinates(b))])]).validate(build()),
        PlanError,
        r"put what acts on them into gs.rotate",
    ),
    "another model": (
        lambda b: gs.Method([gs.Pass("p")], update=[gs.rotate(b, gs.freeze(gs.Coordinates(b)))]).validate(
            build("gpt_neo")
        ),
        SelectionError,
        "another model",
    ),
    "no such weight": (
        lambda b: gs.Coordinates(b, {"model.norm.weight": torch.ones(24).bool()}),
        SelectionError,
        "not of 'model.norm.weight'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence(name: str) -> None:
    call, error, message = BAD[name]
    basis = estimators.activation_basis(build(), [batch()], "mlp")
    with pytest.raises(error, match=message):
        call(basis)


def test_a_plan_can_be_read() -> None:
    model = build()
    basis = estimators.activation_basis(model, [batch()], "mlp", top_k=3)
    method = gs.Method([gs.Pass("p")], update=[gs.rotate(basis, gs.freeze(gs.Coordinates(basis)))])
    text = method.explain(model)
    assert "rotate(freeze(" in text and f"{gs.Coordinates(basis).count():,} coordinates of 6 weights" in text
    assert basis.digest in str(method)
    assert isinstance(gs.Coordinates(basis, Masks.of(basis, {})).masks, Masks)
