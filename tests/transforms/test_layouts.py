"""Flags meet inputs of every layout: exact where the layout can be told, an error where it cannot."""

# mypy: disable-error-code="union-attr, operator, index, arg-type"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.transforms.engine.flags import expand_flags
from gradsurgery.transforms.engine.run import Run
from tests.transforms.cases import BATCH, LENGTH, case, gradients

FLAGS = torch.tensor([True, False])


def masked(model: nn.Module, names: Any, where: Any, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    with gs.applied(model, gs.mask(gs.region(model, names), where=where)):
        return gradients(model, loss())


class _Nano(nn.Module):
    """Positions without a batch, and a head that reads the token table by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.ModuleDict({"wte": nn.Embedding(11, 6), "wpe": nn.Embedding(16, 6), "mix": nn.Linear(6, 6)})

    def crop(self, size: int) -> None:
        self.t.wpe.weight = nn.Parameter(self.t.wpe.weight[:size])

    def forward(self, ids: Tensor) -> Tensor:
        h = self.t.wte(ids) + self.t.wpe(torch.arange(ids.shape[1]))
        return F.linear(torch.tanh(self.t.mix(h)), self.t.wte.weight)


def ids_of(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 11, (batch, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["t.wpe.weight", "t.wte.weight", "t.mix.weight"])
def test_positions_without_a_batch_and_functional_ties(name: str) -> None:
    model, ids = _Nano().double(), ids_of(2, 8)
    found = masked(model, name, FLAGS, lambda: torch.tanh(model(ids)).sum())
    stock = gradients(model, torch.tanh(model(ids)).sum())
    other = gradients(model, torch.tanh(model(ids[~FLAGS])).sum())
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, (other if key == name else stock)[key])
    assert not masked(model, name, None, lambda: torch.tanh(model(ids)).sum())[name].count_nonzero()


def test_positions_with_token_flags() -> None:
    model, ids = _Nano().double(), ids_of(2, 8)
    where = torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    reference = model(ids)
    h = torch.zeros(2, 8, 6, dtype=torch.double, requires_grad=True)
    with gs.applied(model, gs.mask(gs.region(model, "t.wpe.weight"), where=where)):
        torch.testing.assert_close(model(ids), reference)
        found = gradients(model, torch.tanh(model(ids)).sum())["t.wpe.weight"]
    x = model.t.wte(ids) + model.t.wpe(torch.arange(8)) + h
    y = torch.tanh(F.linear(torch.tanh(model.t.mix(x)), model.t.wte.weight))
    (dh,) = torch.autograd.grad(y.sum(), h)
    torch.testing.assert_close(found[:8], dh.masked_fill(where[..., None], 0.0).sum(0))


def test_as_many_positions_as_examples_is_ambiguous() -> None:
    model, ids = _Nano(), ids_of(4, 4)
    where = torch.tensor([True, False, False, True])
    with pytest.raises(BatchError, match="positions without a batch"):
        masked(model, "t.wpe.weight", where, lambda: model(ids).sum())
    masked(model, "t.wpe.weight", torch.ones(4, dtype=torch.bool), lambda: model(ids).sum())


def test_flattened_rows_are_known_by_the_shape_of_the_pass() -> None:
    assert expand_flags(FLAGS, (16,), "x", (2, 8)).tolist() == [True] * 8 + [False] * 8
    assert expand_flags(FLAGS, (16,), "x").tolist() == [True] * 8 + [False] * 8
    for shape, lead in (((2, 8), (8,)), ((2, 8), (4,)), (None, (3,)), (None, (8, 2)), ((2, 8), (8, 2))):
        with pytest.raises(BatchError, match="cannot be told apart"):
            expand_flags(FLAGS, lead, "x", shape)


def test_heads_as_many_as_tokens() -> None:
    tokens = torch.tensor([[True, False, True], [False, False, True]])
    with pytest.raises(BatchError, match="two dimensions agree"):
        expand_flags(tokens, (2, 3, 3), "q_norm", (2, 3))
    assert expand_flags(FLAGS, (2, 3, 3), "q_norm", (2, 3))[:, 0, 0].tolist() == [True, False]
    alike = FLAGS[:, None].expand(2, 3)
    assert expand_flags(alike, (2, 3, 3), "q_norm", (2, 3))[:, 2, 1].tolist() == [True, False]
    assert torch.equal(expand_flags(tokens, (2, 3, 4), "q_norm")[:, :, 0], tokens)
    assert torch.equal(expand_flags(tokens, (2, 4, 3), "q_norm")[:, 0], tokens)


@pytest.mark.parametrize("channels", [5, 7])
def test_convolutions_have_tokens_last(channels: int) -> None:
    conv = nn.Sequential(nn.Conv1d(channels, channels, 3, padding=1)).double()
    x = torch.randn(2, channels, 7, dtype=torch.double)
    where = torch.rand(2, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    found = masked(conv, "0.weight", where, lambda: torch.tanh(conv(x)).sum())
    y = torch.tanh(conv(x))
    wanted = gradients(conv, y.masked_fill(where[:, None], 0.0).sum())
    torch.testing.assert_close(found["0.weight"], wanted["0.weight"])


class _RowMixer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_outputs_whose_dimensions_agree_are_ambiguous() -> None:
    model = nn.Sequential(_RowMixer(5))
    where = torch.rand(2, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    with pytest.raises(BatchError, match="cannot be told apart"):
        masked(model, "0.weight", where, lambda: model(torch.randn(2, 5, 5)).sum())
    masked(model, "0.weight", FLAGS, lambda: model(torch.randn(2, 5, 5)).sum())


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(2, 6), lambda: nn.BatchNorm1d(6).eval(), lambda: nn.InstanceNorm1d(6, affine=True)]
)
def test_norms_that_mix_rows(norm: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(norm()).double()
    x = torch.randn(2, 6, 4, dtype=torch.double)
    with gs.applied(model, gs.mask(gs.region(model, "0.weight"), where=FLAGS)):
        y = model(x)
        found = gradients(model, torch.tanh(y).sum())
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(found["0.weight"], gradients(model, torch.tanh(model(x))[~FLAGS].sum())["0.weight"])


def test_running_statistics_are_not_updated_twice() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6))
    before = model[0].running_mean.clone()
    with pytest.raises(PlanError, match="running statistics"):
        masked(model, "0.weight", FLAGS, lambda: model(torch.randn(2, 6, 4)).sum())
    assert torch.equal(model[0].running_mean, before)
    assert not masked(model, "0.weight", None, lambda: model(torch.randn(2, 6, 4)).sum())["0.weight"].count_nonzero()


class _CalledAndRead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.child(x)), self.child.weight)


def test_a_layer_that_is_called_and_read() -> None:
    model, x = _CalledAndRead(), torch.randn(2, 4, 3)
    found = masked(model, "child.weight", FLAGS, lambda: torch.tanh(model(x)).sum())
    wanted = gradients(model, torch.tanh(model(x))[~FLAGS].sum())
    torch.testing.assert_close(found["child.weight"], wanted["child.weight"])


class _Dict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        return {"y": F.linear(x, self.child.weight), "none": None}


def test_outputs_in_a_dict() -> None:
    model, x = _Dict(), torch.randn(2, 4, 3)
    found = masked(model, "child.weight", FLAGS, lambda: torch.tanh(model(x)["y"]).sum())
    wanted = gradients(model, torch.tanh(model(x)["y"])[~FLAGS].sum())
    torch.testing.assert_close(found["child.weight"], wanted["child.weight"])


def test_tokens_before_examples() -> None:
    model, x = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 6, 0.0)), torch.randn(2, 2, 6)
    for name in ("0.linear1.weight", "0.norm1.weight", "0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight"):
        with pytest.raises(BatchError, match="batch_first"):
            masked(model, name, FLAGS, lambda: model(x).sum())
        assert not masked(model, name, FLAGS | True, lambda: model(x).sum())[name].count_nonzero()


def test_flags_changed_in_place() -> None:
    model, x, where = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 4, 3), FLAGS.clone()
    with gs.applied(model, gs.mask(gs.region(model, "0.weight"), where=where)):
        gradients(model, model(x).sum())
        where.logical_not_()
        found = gradients(model, model(x).sum())
    torch.testing.assert_close(found["0.weight"], gradients(model, model(x[FLAGS]).sum())["0.weight"])


@pytest.mark.parametrize("size", [3, 9])
def test_uniform_flags_of_another_batch(size: int) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(4, 7, 3)
    with pytest.raises(BatchError):
        masked(model, "0.weight", torch.ones(size, dtype=torch.bool), lambda: model(x).sum())
    with pytest.raises(BatchError, match="the batch has 4"):
        Run({"forget": torch.ones(size, dtype=torch.bool)}, 1, (4, 7)).flags("forget", "0")


@pytest.mark.parametrize("where", [[True, False], np.array([True, False]), 1, {"encoder": 1}, {}, {1: "forget"}, True])
def test_wheres_of_other_types(where: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(PlanError, match="where"):
        gs.mask(gs.region(model, "0.weight"), where=where)
    with pytest.raises(PlanError, match="where"):
        gs.zero(case("t5").anatomy.neurons[:, :1], where=where)


def test_one_where_per_part_of_an_encoder_decoder() -> None:
    c = case("t5")
    by_example = torch.tensor([True, False, False, True])
    everything = gs.region(c.model, "*") - c.anatomy.structure("shared relative position bias")
    found, plain = (
        _under(c, gs.mask(everything, where=where))
        for where in ({"encoder": by_example, "decoder": by_example}, by_example)
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)
    assert everything.entries.keys() >= {"shared.weight"}
    encoder_only = {"encoder": by_example, "decoder": torch.zeros(BATCH, dtype=torch.bool)}
    found, stock = _under(c, gs.mask(everything, where=encoder_only)), gradients(c.model, c.loss())
    for name, gradient in stock.items():
        if name in everything.entries and name != "shared.weight":
            wanted = plain[name] if name.startswith("encoder.") else gradient
            torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-7)


def _under(c: Any, *transforms: Any) -> dict[str, Tensor]:
    with gs.applied(c.model, *transforms):
        return gradients(c.model, c.loss())


def test_cross_attention_tells_its_rows_by_their_number() -> None:
    encoder, decoder = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, LENGTH, dtype=torch.bool)
    where = {"encoder": encoder, "decoder": decoder}
    path, run = "decoder.block.0.layer.1.EncDecAttention.k", Run()
    assert run.flags(where, path, (2, 5)) is encoder
    assert run.flags(where, path, (2, LENGTH)) is decoder
    assert run.flags(where, "lm_head", (2, LENGTH)) is decoder
    same = {"encoder": torch.ones(2, LENGTH, dtype=torch.bool), "decoder": decoder}
    with pytest.raises(BatchError, match="decoder or encoder rows"):
        run.flags(same, path, (2, LENGTH))
