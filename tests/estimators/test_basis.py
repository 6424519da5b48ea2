"""Bases of activations, against second moments that are summed the slow way, and against the layers' own outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError, SelectionError
from gradsurgery.estimators.importance import rotated
from tests.surgery.tiny import build, weights
from tests.transforms.cases import case

ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "vit", "t5", "bert"]
few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
basis_of: Any = gs.estimators.activation_basis


def batch(rows: int = 4, tokens: int = 7, seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Rows of different lengths, padded on one side; every second attended token is labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, tokens), generator=generator)
    lengths = torch.randint(3, tokens + 1, (rows, 1), generator=generator)
    places = torch.arange(tokens)[None]
    mask = (places >= tokens - lengths) if left else (places < lengths)
    labels = ids.masked_fill(~mask | (places % 2 == 0), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def second_moment(basis: gs.estimators.Basis, name: str) -> Tensor:
    u, s = basis[name].double(), basis.spectrum(name).double()
    return (u * s.unsqueeze(-2)) @ u.mT


def read_by(model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What every linear-like leaf read and gave out, by module."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, n=name: seen.setdefault(n, []).append((a[0], out)))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and not isinstance(module, nn.Embedding)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return {name: found[0] for name, found in seen.items() if len(found) == 1}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_second_moments_are_those_of_the_inputs_and_outputs(name: str) -> None:
    here = case(name)
    basis = basis_of(here.model, [here.batch])
    outputs = basis_of(here.model, [here.batch], side="output")
    seen = read_by(here.model, here.batch)
    checked = 0
    for parameter in basis.sites:
        u = basis[parameter]
        torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[-1], dtype=u.dtype).expand(*u.shape[:-2], -1, -1))
        if (module := parameter.removesuffix(".weight")) not in seen:
            continue
        x, y = seen[module]
        bias = here.model.get_submodule(module).bias
        if y.dim() == 4:  # a convolution: its outputs are rows of channels
            y = y.movedim(1, -1)
        else:
            flat = x.reshape(-1, x.shape[-1])
            torch.testing.assert_close(second_moment(basis, parameter), flat.T @ flat / len(flat), rtol=1e-6, atol=1e-9)
        y = (y - bias if bias is not None else y).reshape(-1, y.shape[-1])
        torch.testing.assert_close(second_moment(outputs, parameter), y.T @ y / len(y), rtol=1e-5, atol=1e-9)
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_every_fused_expert_has_the_basis_of_the_tokens_that_reach_it(name: str) -> None:
    here = case(name)
    basis = basis_of(here.model, [here.batch])
    found = [n for n, site in basis.sites.items() if site.layout.kind == "experts"]
    assert len(found) >= 4
    for parameter in found:
        path, own = parameter.rsplit(".", 1)
        module: Any = here.model.get_submodule(path)
        weight = getattr(module, own)
        for expert in range(len(weight)):
            # what the expert reads lies in the span of its basis: moving the weight across it changes nothing
            rank = int((basis.spectrum(parameter)[expert] > 1e-12).sum())
            outside = basis[parameter][expert][:, rank:]
            if outside.numel():
                with torch.no_grad():
                    before, kept = here.outputs(), weight.detach().clone()
                    matrix = basis.sites[parameter].layout.matrices(weight)[expert]
                    matrix += torch.randn_like(matrix) @ outside @ outside.T
                    after = here.outputs()
                    weight.copy_(kept)
                torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-8)


@few
@given(st.data())
def test_patches_of_convolutions_lie_in_the_order_of_the_weight(data: st.DataObject) -> None:
    dims = data.draw(st.sampled_from([1, 2]))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    kind: Any = nn.Conv1d if dims == 1 else nn.Conv2d
    mode = data.draw(st.sampled_from(["zeros", "reflect", "circular"]))
    padding = data.draw(st.sampled_from([0, 1, "same"]))
    stride = 1 if padding == "same" else data.draw(st.integers(1, 2))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    size = data.draw(st.integers(1, 3))
    conv = kind(4, 8, size, stride, padding, data.draw(st.integers(1, 2)), groups, padding_mode=mode).double()
    x = torch.randn(3, 4, *[9] * dims, dtype=torch.float64)
    model = nn.Sequential(conv)
    basis = basis_of(Wrapped(model), [{"x": x}], "all-linear")
    name = "inner.0.weight"
    y = (conv(x) - conv.bias.reshape(-1, *[1] * dims)).movedim(1, -1).reshape(-1, 8)  # type: ignore[union-attr]
    w = basis.sites[name].layout.matrices(conv.weight)
    own = w @ second_moment(basis, name) @ w.mT
    y = y.reshape(len(y), groups, -1).movedim(1, 0) if groups > 1 else y
    torch.testing.assert_close(own, y.mT @ y / y.shape[-2])


class Wrapped(nn.Module):
    """A plain module that takes a batch by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(("kind", "left"), [("llama", False), ("llama", True), ("mixtral", False)])
def test_padding_does_not_count(kind: str, left: bool) -> None:
    model = case("mixtral").copy() if kind == "mixtral" else build().double()
    padded = batch(left=left)
    alone = [
        {"input_ids": ids[mask.bool()][None]}
        for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]
    found, wanted = basis_of(model, [padded]), basis_of(model, alone)
    for name in found.sites:
        torch.testing.assert_close(second_moment(found, name), second_moment(wanted, name), rtol=1e-5, atol=1e-7)
        assert torch.equal(found.counts[found.sites[name].key], wanted.counts[wanted.sites[name].key])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"positions": "response"},
        {"skip_first": 2},
        {"centre": True},
        {"normalise": "token"},
        {"winsorise": 0.9},
        {"winsorise": 1.5},
        {"positions": "response", "skip_first": 1, "centre": True, "normalise": "token", "winsorise": 2.0},
    ],
    ids=str,
)
def test_options_against_the_slow_way(options: dict[str, Any], left: bool) -> None:
    model = build().double()
    name = "model.layers.1.mlp.down_proj"
    batches = [batch(seed=0, left=left), batch(rows=3, seed=1, left=left)]
    rows = []
    for each in batches:
        x = read_by(model, {k: v for k, v in each.items() if k != "labels"})[name][0]
        for row, mask, labels in zip(x, each["attention_mask"], each["labels"], strict=True):
            attended = mask.nonzero().flatten().tolist()[options.get("skip_first", 0) :]
            for place in attended:
                if options.get("positions") != "response" or labels[place] != -100:
                    rows.append(row[place].clone())
    for row in rows:
        if (limit := options.get("winsorise")) is not None:
            ordered = row.abs().sort().values
            most = ordered[max(round(limit * len(row)), 1) - 1] if limit < 1 else limit * row.square().mean().sqrt()
            row.clamp_(-most, most)
        if options.get("normalise"):
            row /= row.norm()
    stacked = torch.stack(rows)
    stacked = stacked - stacked.mean(0) if options.get("centre") else stacked
    found = basis_of(model, batches, name, **options)
    wanted = stacked.T @ stacked / len(rows)
    torch.testing.assert_close(second_moment(found, f"{name}.weight"), wanted, rtol=1e-6, atol=1e-10)


def test_layers_that_read_one_tensor_share_a_basis() -> None:
    model = build()
    together, apart = basis_of(model, [batch()]), basis_of(model, [batch()], share=False)
    assert len(together.vectors) == 8 and len(apart.vectors) == 14
    part = "model.layers.0.self_attn."
    assert len({together.sites[f"{part}{n}_proj.weight"].key for n in "qkv"}) == 1
    for name in apart.sites:
        torch.testing.assert_close(together[name], apart[name])


def test_passes_change_nothing_but_memory() -> None:
    model, batches = build(), [batch(), batch(seed=1)]
    whole = basis_of(model, batches, share=False)
    parts = basis_of(model, batches, share=False, passes=4, device="cpu")
    assert all(torch.equal(whole[name], parts[name]) for name in whole.sites)
    assert whole.about == parts.about  # data and options are the same
    with pytest.raises(PlanError, match="iterator"):
        basis_of(model, iter(batches), passes=2)


def test_top_directions_in_factored_form() -> None:
    model, batches = build(), [batch()]
    whole, few_ = basis_of(model, batches), basis_of(model, batches, top_k=5)
    cut = whole.top(5)
    for name in whole.sites:
        assert torch.equal(whole[name][:, :5], few_[name]) and torch.equal(few_[name], cut[name])
        assert few_.rotated_shape(name)[-1] == 5
        share = whole.spectrum(name)[: whole.rank(name, 0.9)].sum() / whole.spectrum(name).sum()
        fewer = whole.spectrum(name)[: whole.rank(name, 0.9) - 1].sum() / whole.spectrum(name).sum()
        assert share >= 0.9 - 1e-6 > fewer - 2e-6
        assert whole.top(energy=0.9)[name].shape[-1] >= whole.rank(name, 0.9)
    assert {row["kept"] for row in few_.table()} == {5} and "rank 90%" in few_.table()[0]
    with pytest.raises(PlanError, match="keeps 5"):
        few_.top(energy=0.9999)


def test_half_precision_models_are_summed_in_fp32() -> None:
    model = build().to(torch.bfloat16)
    batches = [batch(rows=8, seed=k) for k in range(20)]
    basis = basis_of(model, batches, "down_proj")
    name = "model.layers.0.mlp.down_proj"
    total, count = torch.zeros(20, 20, dtype=torch.float64), 0
    for each in batches:
        x = read_by(model.eval(), {k: v for k, v in each.items() if k != "labels"})[name][0]
        rows = x[each["attention_mask"].bool()].double()
        total, count = total + rows.T @ rows, count + len(rows)
    torch.testing.assert_close(second_moment(basis, f"{name}.weight"), total / count, rtol=1e-4, atol=1e-7)
    assert basis[f"{name}.weight"].dtype == torch.float32
    assert basis.about["dtype"] == "bfloat16"


def test_the_model_is_left_as_it_was() -> None:
    model = case("mixtral").copy().train()
    model.model.layers[0].eval()
    before, modes = weights(model), {n: m.training for n, m in model.named_modules()}
    implementation = model.config._experts_implementation
    basis_of(model, [batch()])
    with pytest.raises(BatchError):
        basis_of(model, [{**batch(), "attention_mask": torch.zeros(4, 7).long()}])
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert model.config._experts_implementation == implementation
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_rotating_there_and_back_keeps_the_weight() -> None:
    for name in ARCHITECTURES:
        here = case(name, torch.float32)
        for side in ("input", "output"):
            basis = basis_of(here.model, [here.batch], side=side)
            for parameter, site in basis.sites.items():
                weight = here.model.get_parameter(parameter)
                turned = rotated(basis, parameter, weight)
                u = basis[parameter]
                back = site.layout.weight(turned @ u.mT if side == "input" else u @ turned, tuple(weight.shape))
                assert (back - weight).norm() <= 1e-6 * weight.norm(), (name, side, parameter)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no batch": ({"batches": []}, BatchError, "no batches"),
    "all padding": (
        {"batches": [batch(), {**batch(), "attention_mask": torch.zeros(4, 7).long()}]},
        BatchError,
        "batch 1.*no position",
    ),
    "no labels": ({"positions": "response", "batches": [{"input_ids": batch()["input_ids"]}]}, BatchError, "labels"),
    "too few samples": ({"top_k": 20, "batches": [batch(rows=2)]}, BatchError, "20 directions .* from"),
    "more than there are": ({"top_k": 25, "modules": "down_proj"}, PlanError, "has 20 directions"),
    "one batch": ({"batches": batch()}, PlanError, r"\[batch\]"),
    "side": ({"side": "both"}, PlanError, "side"),
    "winsorise": ({"winsorise": 0.0}, PlanError, "winsorise"),
    "skip_first": ({"skip_first": -1}, PlanError, "skip_first"),
    "no such module": ({"modules": "nonsense"}, SelectionError, "matches no parameter"),
    "norms": ({"modules": "*norm.weight"}, SelectionError, "names no weight"),
    "embeddings": ({"modules": "embed_tokens"}, SelectionError, "embed_tokens.weight is no weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence(name: str) -> None:
    given_, error, message = BAD[name]
    model = build()
    with pytest.raises(error, match=message):
        basis_of(model, **{"batches": [batch()], **given_})
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_nan_in_activations_names_the_layer() -> None:
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(BatchError, match=r"batch 0: the input of model.layers.1.mlp.down_proj.weight holds nan"):
        basis_of(model, [batch()])


def test_layers_that_are_not_used_and_parts_of_weights_are_refused() -> None:
    model = build()
    model.model.spare = nn.Linear(24, 24)
    with pytest.raises(BatchError, match=r"model.spare.weight never met an input"):
        basis_of(model, [batch()])
    part = gs.dissect(build()).neurons[0, :3]
    with pytest.raises(SelectionError, match="holds a part of"):
        basis_of(build(), [batch()], part)
