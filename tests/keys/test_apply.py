"""Applying keys to real architectures: exactly what the key names changes places, and comes back bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import gradsurgery as gs
from gradsurgery.errors import KeyWarning
from tests.keys.cases import ARCHITECTURES, HALVES, bits, copy_of, keys, pairs, same, slow_, source, tensors_of, traces
from tests.transforms.cases import FAST, SLOW, case, gradients

pytestmark = pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")
WHOLE = ("attn_heads", "mlp_cols", "experts")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

few = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
others = [name for name in [*FAST, *SLOW] if name not in ARCHITECTURES]
each_architecture = pytest.mark.parametrize(
    "name", [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]
)


def with_gradients(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@each_architecture
@few
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_exactly_what_the_key_names_changes_places(name: str, data: st.DataObject, dtype: torch.dtype) -> None:
    key, model = data.draw(keys(name)), copy_of(name, dtype)
    state, grads = tensors_of(model), with_gradients(model)
    before, before_grads, left = bits(state), bits(grads), traces(model)
    wanted, wanted_grads = ({n: t.detach().clone() for n, t in d.items()} for d in (state, grads))
    slow_(wanted, name, key)
    slow_(wanted_grads, name, key)
    key.apply_(model, anatomy=case(name).anatomy)
    assert same(bits(tensors_of(model)), bits(wanted))
    assert same(bits(grads), bits(wanted_grads))
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    region = key.region(case(name).anatomy)
    for n, p in model.named_parameters():
        moved = bits({n: p})[n] != before[n]
        assert not (moved & ~region.of(n).mask()).any(), f"{n} moved outside of the region"
    key.unapply_(model)
    assert same(bits(tensors_of(model)), before)
    assert same(bits(grads), before_grads)
    assert traces(model) == left


@each_architecture
@few
@given(data=st.data())
def test_the_region_is_both_ends_of_every_swap(name: str, data: st.DataObject) -> None:
    """What moves when every entry differs from every other: nothing less, and nothing more."""
    key, model = data.draw(keys(name)), case(name).model
    ids = {n: torch.arange(p.numel()).view(p.shape) + 10**7 * k for k, (n, p) in enumerate(model.named_parameters())}
    moved = {n: t.clone() for n, t in ids.items()}
    slow_(moved, name, key)
    region = key.region(case(name).anatomy)
    assert all(torch.equal(moved[n] != ids[n], region.of(n).mask()) for n in ids)


@each_architecture
@few
@given(data=st.data())
def test_moments_follow(name: str, data: st.DataObject) -> None:
    key, model = data.draw(keys(name)), copy_of(name, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with_gradients(model)
    optimizer.step()
    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    before = {m: {n: optimizer.state[p][m].clone() for n, p in model.named_parameters()} for m in moments}
    wanted = {m: {n: t.clone() for n, t in found.items()} for m, found in before.items()}
    for m in moments:
        slow_(wanted[m], name, key)
    for expected, turn in ((wanted, key.apply_), (before, key.unapply_)):
        turn(model, optimizer=optimizer, anatomy=case(name).anatomy)
        for m in moments:
            found = {n: optimizer.state[p][m] for n, p in model.named_parameters()}
            assert same(bits(found), bits(expected[m]))


@each_architecture
@few
@given(data=st.data())
def test_gradients_follow_by_the_adjoint(name: str, data: st.DataObject) -> None:
    """The gradient of C2, followed back, is that of ``theta -> loss(P theta)`` in C1."""
    c, key = case(name), data.draw(keys(name))
    model = copy_of(name)
    at, gather = source(name, key, model)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    turned = theta[gather]
    permuted = {n: turned[s].view(model.get_parameter(n).shape) for n, s in at.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    slow_({**{n: p.detach().clone() for n, p in model.named_parameters()}, **buffers}, name, key)

    class Permuted(nn.Module):
        def forward(self, **batch: object) -> object:
            return torch.func.functional_call(model, {**permuted, **buffers}, kwargs=batch, tie_weights=True)  # type: ignore[arg-type]

    loss = c.loss(Permuted())  # type: ignore[arg-type]
    (wanted,) = torch.autograd.grad(loss, theta)
    with key.applied(model, anatomy=c.anatomy):
        found = c.loss(model)
        assert torch.equal(found, loss)
        found.backward()
    for n, s in at.items():
        grad = model.get_parameter(n).grad
        gap = wanted[s].view(model.get_parameter(n).shape) - (0.0 if grad is None else grad)
        assert float(gap.abs().max()) <= 1e-12 * float(wanted.abs().max()), n


@each_architecture
@few
@given(data=st.data())
def test_the_permutation_is_its_own_adjoint(name: str, data: st.DataObject) -> None:
    key, c = data.draw(keys(name)), case(name)
    swap = key.plan(c.anatomy).weights
    generator = torch.Generator().manual_seed(1)

    def draw() -> dict[str, torch.Tensor]:
        shapes = {n: c.model.get_parameter(n).shape for n in swap.names}
        return {n: torch.randint(-9, 9, s, generator=generator).double() for n, s in shapes.items()}

    v, w = draw(), draw()
    moved_v, moved_w = ({n: t.clone() for n, t in d.items()} for d in (v, w))
    swap(moved_v)
    swap(moved_w)
    assert sum((moved_v[n] * w[n]).sum() for n in v) == sum((v[n] * moved_w[n]).sum() for n in v)


@each_architecture
@few
@given(data=st.data())
def test_interchangeable_units_of_a_layer_change_no_output(name: str, data: st.DataObject) -> None:
    assume(any(pairs(name, list_, False) for list_ in WHOLE))
    c, key, model = case(name), data.draw(keys(name, WHOLE, across=False)), copy_of(name)
    with torch.no_grad():
        before = c.outputs(model)
        key.apply_(model, anatomy=c.anatomy)
        after = c.outputs(model)
    assert float((after - before).abs().max()) <= 2e-6 * float(before.abs().max())


@each_architecture
def test_swaps_across_layers_change_the_outputs(name: str) -> None:
    c, model = case(name), copy_of(name)
    key = gs.PermutationKey.generate(c.anatomy, fraction=0.4 if name == "mamba2" else 0.3, seed=0)
    with torch.no_grad():
        before = c.outputs(model)
        with key.applied(model, anatomy=c.anatomy):
            inside = c.outputs(model)
        after = c.outputs(model)
    assert float((inside - before).abs().max()) > 1e-3 * float(before.abs().max())
    assert torch.equal(before, after)


@pytest.mark.parametrize("list_", HALVES)
def test_each_list_alone(list_: str) -> None:
    """One swap of each list moves what it names in a model that has all of them."""
    model = copy_of("gpt_oss")
    a, b = pairs("gpt_oss", list_, True)[0]
    key = gs.PermutationKey(**dict[str, Any]({list_: [[a.at, b.at]]}))
    before, wanted = bits(tensors_of(model)), {n: t.detach().clone() for n, t in tensors_of(model).items()}
    slow_(wanted, "gpt_oss", key)
    key.apply_(model, anatomy=case("gpt_oss").anatomy)
    assert same(bits(tensors_of(model)), bits(wanted))
    assert not same(bits(wanted), before)
    moved = sum(int((bits({n: wanted[n]})[n] != before[n]).sum()) for n, _ in model.named_parameters())
    assert moved == key.region(case("gpt_oss").anatomy).numel()


def test_eight_bit_floats() -> None:
    """Weights that are stored in a byte each move as bytes."""
    model = copy_of("llama", torch.float32)
    for module in model.modules():
        for n, p in list(module.named_parameters(recurse=False)):
            setattr(module, n, nn.Parameter(p.detach().to(torch.float8_e4m3fn), requires_grad=False))
    key = gs.PermutationKey(attn_heads=[[[0, 0], [2, 1]]], mlp_cols=[[[0, 3], [1, 5]], [[2, 1], [0, 7]]])
    before, wanted = bits(tensors_of(model)), {n: t.detach().float() for n, t in tensors_of(model).items()}
    slow_(wanted, "llama", key)
    key.apply_(model, anatomy=case("llama").anatomy)
    assert all(torch.equal(p.float(), wanted[n]) for n, p in model.named_parameters())
    key.unapply_(model)
    assert same(bits(tensors_of(model)), before)


def test_nan_and_infinite_weights_keep_their_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = copy_of("gpt2", dtype)
        word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(k)
                p.view(word).copy_(torch.randint(-(2**15), 2**15, p.shape, generator=generator).to(word))
        key = gs.PermutationKey.generate(case("gpt2").anatomy, fraction=0.4, seed=1)
        before, wanted = bits(tensors_of(model)), bits(tensors_of(model))
        slow_(wanted, "gpt2", key)
        key.apply_(model, anatomy=case("gpt2").anatomy)
        assert same(bits(tensors_of(model)), wanted)
        key.unapply_(model)
        assert same(bits(tensors_of(model)), before)


@pytest.mark.parametrize("name", ["gpt_neo", "llama", "mixtral"])
def test_missing_gradients_and_frozen_parameters(name: str) -> None:
    """A gradient that one end lacks is zeros while it is elsewhere, and is gone again when nothing came back to it."""
    c, model = case(name), copy_of(name)
    key = gs.PermutationKey.generate(c.anatomy, fraction=0.4, seed=2)
    names = [n for n, _ in model.named_parameters()]
    frozen = set(names[::3])
    for n, p in model.named_parameters():
        p.requires_grad_(n not in frozen)
        p.grad = None if n in frozen or names.index(n) % 2 else torch.rand_like(p)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    wanted = {n: before.get(n, torch.zeros_like(p)).clone() for n, p in model.named_parameters()}
    slow_(wanted, name, key)
    key.apply_(model, anatomy=c.anatomy)
    for n, p in model.named_parameters():
        assert torch.equal(torch.zeros_like(p) if p.grad is None else p.grad, wanted[n]), n
    key.unapply_(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == before.keys()
    assert all(torch.equal(model.get_parameter(n).grad, g) for n, g in before.items())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights(tied: bool) -> None:
    """Tied embeddings stay tied, and stay where they are."""
    from tests.surgery.tiny import build

    model = build("llama", tie_word_embeddings=tied)
    key = gs.PermutationKey.generate(gs.dissect(model), fraction=0.4, seed=0)
    left = model.lm_head.weight, model.lm_head.weight.clone()
    key.apply_(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight is left[0] and torch.equal(*left)


def test_disjoint_keys_stack_in_any_order() -> None:
    c, model = case("gpt_neo"), copy_of("gpt_neo")
    one, two = gs.PermutationKey.generate(c.anatomy, fraction=0.2, count=2, seed=0)
    before, wanted = bits(tensors_of(model)), {n: t.detach().clone() for n, t in tensors_of(model).items()}
    slow_(wanted, "gpt_neo", one)
    slow_(wanted, "gpt_neo", two)
    left = traces(model)
    for first, second in ((one, two), (two, one)):
        for back in ((first, second), (second, first)):
            first.apply_(model, anatomy=c.anatomy)
            second.apply_(model, anatomy=c.anatomy)
            assert same(bits(tensors_of(model)), bits(wanted))
            for key in back:
                key.unapply_(model)
            assert same(bits(tensors_of(model)), before)
            assert traces(model) == left


def test_warnings_come_once_a_model() -> None:
    c, model = case("gpt_neo"), copy_of("gpt_neo")
    key = gs.PermutationKey(attn_heads=[[[0, 0], [1, 1]]])
    with pytest.warns(KeyWarning, match="different attention_layers"):
        key.apply_(model, anatomy=c.anatomy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        key.unapply_(model)
        key.apply_(model)


def test_parameters_that_are_views_of_one_buffer() -> None:
    """Flattened parameters: each still is a view of the flat one, which sees the swap."""
    c, model = case("gpt2"), copy_of("gpt2")
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, model.parameters())
    _, gather = source("gpt2", key := gs.PermutationKey.generate(c.anatomy, seed=3), model)
    before = flat.clone()
    key.apply_(model, anatomy=c.anatomy)
    assert torch.equal(flat, before[gather])


def test_the_gradient_of_a_model_in_c2_is_the_plain_gradient() -> None:
    """A keyed model is a plain model with other weights."""
    c, model = case("gpt_neox"), copy_of("gpt_neox")
    key = gs.PermutationKey.generate(c.anatomy, seed=3)
    plain = copy_of("gpt_neox")
    state = tensors_of(plain)
    with torch.no_grad():
        slow_(state, "gpt_neox", key)
    key.apply_(model, anatomy=c.anatomy)
    found, wanted = gradients(model, c.loss(model)), gradients(plain, c.loss(plain))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
