"""Masked entries receive exactly nothing, in every dtype and whatever comes in; frozen parameters stay out of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from tests.transforms.cases import BATCH, case, flags, gradients, regions, units
from tests.transforms.test_properties import ARCHITECTURES, BY_EXAMPLE_ONLY, few

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@each_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("poison", [1.0, float("inf"), float("nan")])
def test_masked_entries_are_zero(name: str, dtype: torch.dtype, poison: float) -> None:
    c = case(name, dtype)

    @settings(few, max_examples=1)
    @given(regions(c))
    def check(region: gs.Region) -> None:
        for transform in (
            gs.mask(region),
            gs.scale(region, 0.0),
            gs.mask(region, where=torch.ones(BATCH, dtype=torch.bool)),
        ):
            with gs.applied(c.model, transform):
                found = gradients(c.model, c.loss() * poison)
            for parameter, entries in region.entries.items():
                assert not found[parameter][entries.mask()].count_nonzero(), parameter

    check()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss", "bert"])
def test_masked_rows_contribute_nothing_even_if_infinite(name: str) -> None:
    """Only the flagged example's loss is inf: what it masks stays as the others make it."""
    c = case(name)

    @settings(few, max_examples=2)
    @given(units(c))
    def check(chosen: gs.Units) -> None:
        where = torch.tensor([False, True, False, False])
        scale = torch.where(where, torch.inf, 1.0).double()
        with gs.applied(c.model, gs.mask(chosen, where=where)):
            logits = c.outputs()
            found = gradients(c.model, (logits.flatten(1).tanh().sum(1) * scale).sum())
        clean = gradients(c.model, c.outputs().flatten(1).tanh().sum(1)[~where].sum())
        for parameter, entries in chosen.entries.items():
            inside = entries.mask()
            torch.testing.assert_close(found[parameter][inside], clean[parameter][inside], rtol=1e-5, atol=1e-6)

    check()


@pytest.mark.parametrize("name", ["gpt_neo", "qwen3", "mixtral", "phi3"])
def test_frozen_parameters(name: str) -> None:
    """Parameters that do not train get no gradient; the others get what they get without freezing."""
    c = case(name)
    frozen_model = c.copy()
    frozen = [p for k, p in enumerate(frozen_model.parameters()) if k % 2]
    for parameter in frozen:
        parameter.requires_grad_(False)

    @settings(few, max_examples=2)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        chosen = data.draw(units(c))
        where = data.draw(flags(c, tokens=name not in BY_EXAMPLE_ONLY))
        for make in (gs.mask, gs.zero, gs.detach):
            transform = make(chosen, where=where)
            try:
                with gs.applied(frozen_model, transform):
                    found = gradients(frozen_model, c.loss(frozen_model))
            except gs.errors.SelectionError:
                trainable = {n for n, p in frozen_model.named_parameters() if p.requires_grad}
                assert make is gs.mask and not trainable & set(chosen.entries)
                continue
            with gs.applied(c.model, transform):
                wanted = gradients(c.model, c.loss())
            for parameter in found:
                torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-9, atol=1e-12)

    check()
    with (
        pytest.raises(gs.errors.SelectionError, match="frozen"),
        gs.applied(
            frozen_model,
            gs.mask(gs.region(frozen_model, [n for n, p in frozen_model.named_parameters() if not p.requires_grad])),
        ),
    ):
        pass
