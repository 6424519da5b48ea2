"""Every forward transform on real architectures, against oracles that run one example at a time.

A new transform adds a line to ``TRANSFORMS``; which properties are tested follows from its traits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.transforms import ForwardTransform
from tests.transforms import oracle
from tests.transforms.cases import (
    BATCH,
    FAST,
    LENGTH,
    SLOW,
    Case,
    assert_close,
    case,
    flags,
    gradients,
    regions,
    units,
)


@dataclass(frozen=True)
class Subject:
    """A transform under test, what it acts on, and its oracles by example and by token."""

    make: Callable[..., ForwardTransform]
    targets: Callable[[Case], st.SearchStrategy[Any]]
    by_example: Callable[[Case, Any, Tensor | None], oracle.Grads]
    by_token: Callable[[Case, Any, Tensor | None], oracle.Grads] | None


def _scale(factor: float) -> Subject:
    return Subject(
        lambda region, where=None: gs.scale(region, factor, where),
        regions,
        lambda case, region, where: oracle.scaled(case, region, factor, where),
        lambda case, region, where: oracle.scaled_by_row(case, region, factor, where),
    )


TRANSFORMS = {
    "mask": Subject(
        gs.mask,
        regions,
        lambda case, region, where: oracle.scaled(case, region, 0.0, where),
        lambda case, region, where: oracle.scaled_by_row(case, region, 0.0, where),
    ),
    "scale(0.5)": _scale(0.5),
    "scale(-0.75)": _scale(-0.75),
    "scale(0)": _scale(0.0),
    "zero": Subject(gs.zero, units, oracle.zeroed, None),
    "detach": Subject(gs.detach, units, oracle.detached, oracle.detached),
}
ARCHITECTURES = [*FAST, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]]
#: Modules that mix rows inside one computation (sinks, state-space mixers) take flags by example only.
BY_EXAMPLE_ONLY = {"mamba", "mamba2", "vit"}

few = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
each_transform = pytest.mark.parametrize("subject", TRANSFORMS.values(), ids=TRANSFORMS)


def with_trait(trait: str) -> pytest.MarkDecorator:
    c = case("gpt2")
    chosen = {k: s for k, s in TRANSFORMS.items() if getattr(s.make(c.anatomy.neurons[0, :1]).traits, trait)}
    return pytest.mark.parametrize("subject", chosen.values(), ids=chosen)


def under(
    c: Case, *transforms: ForwardTransform, columns: dict[str, Tensor] | None = None, rows: slice | None = None
) -> oracle.Grads:
    batch = c.batch if rows is None else c.rows(rows)
    with gs.applied(c.model, *transforms, columns=columns):
        loss = c.loss(batch=batch, first=0 if rows is None else rows.start)
        return gradients(c.model, loss)


def stock(c: Case) -> oracle.Grads:
    return gradients(c.model, c.loss())


@each_architecture
@with_trait("per_example")
def test_exact_per_example(subject: Subject, name: str) -> None:
    """One mixed batch is the sum of its examples, each with or without the transform."""
    c = case(name)
    reference = stock(c)

    @few
    @given(st.data())
    def check(data: st.DataObject) -> None:
        target = data.draw(subject.targets(c))
        where = data.draw(flags(c, tokens=False))
        column = where is not None and data.draw(st.booleans())
        transform = subject.make(target, where="flag" if column else where)
        found = under(c, transform, columns={"flag": where} if column and where is not None else None)
        if subject.make is gs.detach and name == "deepseek_v3" and any(g.kind != "head" for g, _ in target.groups):
            return
        assert_close(found, subject.by_example(c, target, where), reference)

    check()


@each_architecture
@with_trait("per_example")
def test_exact_per_token(subject: Subject, name: str) -> None:
    """Flags ``[batch, token]`` speak of positions of the module's input."""
    c = case(name)
    if subject.by_token is None or name in BY_EXAMPLE_ONLY:
        pytest.skip("flags by example only")
    reference = stock(c)

    @few
    @given(st.data())
    def check(data: st.DataObject) -> None:
        target = data.draw(subject.targets(c))
        where = data.draw(flags(c))
        if subject.make is gs.detach and name == "deepseek_v3" and any(g.kind != "head" for g, _ in target.groups):
            return
        assert_close(under(c, subject.make(target, where=where)), subject.by_token(c, target, where), reference)  # type: ignore[misc]

    check()


@each_architecture
def test_every_parameter(name: str) -> None:
    """Each layer type of the model at once: embeddings, positions, norms, convolutions, routers, sinks, heads."""
    c = case(name)
    shared: gs.Region = c.anatomy.structure("shared relative position bias")
    everything, reference = gs.region(c.model, "*") - shared, stock(c)
    where = torch.tensor([True, False, False, True])
    found = under(c, gs.scale(everything, -0.75, where=where))
    assert_close(found, oracle.scaled(c, everything, -0.75, where), reference)
    if name not in BY_EXAMPLE_ONLY:
        tokens = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
        found = under(c, gs.scale(everything, -0.75, where=tokens))
        assert_close(found, oracle.scaled_by_row(c, everything, -0.75, tokens), reference)
    two = (
        gs.mask(everything, where=where),
        gs.scale(everything, 0.5, where=~where),
    )  # several label columns in one pass
    wanted = oracle.by_example(
        c, lambda i, flag: {n: g * (0.0 if flag else 0.5) for n, g in oracle.plain(c, i).items()}, where
    )
    found = under(c, *two)
    for parameter in shared.entries:
        found[parameter] = wanted[parameter]
    assert_close(found, wanted, reference)


@each_architecture
@with_trait("linear")
def test_commutes_with_accumulation(subject: Subject, name: str) -> None:
    """The halves of a batch, accumulated, are the batch."""
    c = case(name)
    reference = stock(c)

    @settings(few, max_examples=1)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        target, where = data.draw(subject.targets(c)), data.draw(flags(c, tokens=False))
        halves = [slice(0, BATCH // 2), slice(BATCH // 2, BATCH)]
        parts = [under(c, subject.make(target, where=None if where is None else where[h]), rows=h) for h in halves]
        assert_close(oracle.summed(parts), under(c, subject.make(target, where=where)), reference)

    check()


@each_architecture
@with_trait("idempotent")
def test_twice_is_once(subject: Subject, name: str) -> None:
    c = case(name)

    @settings(few, max_examples=1)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        transform = subject.make(data.draw(subject.targets(c)), where=data.draw(flags(c, tokens=False)))
        once, twice = under(c, transform), under(c, transform, transform)
        assert_close(twice, once, once, tolerance=1e-9)

    check()


@each_architecture
@with_trait("norm_nonincreasing")
def test_norm_never_grows(subject: Subject, name: str) -> None:
    c = case(name)
    before = sum(float(g.square().sum()) for g in stock(c).values())

    @settings(few, max_examples=1)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        found = under(c, subject.make(data.draw(subject.targets(c))))
        assert sum(float(g.square().sum()) for g in found.values()) <= before * (1 + 1e-9)

    check()


@each_architecture
@with_trait("value_preserving")
def test_value_is_kept(subject: Subject, name: str) -> None:
    c = case(name)

    @settings(few, max_examples=2)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        transform = subject.make(
            data.draw(subject.targets(c)), where=data.draw(flags(c, tokens=name not in BY_EXAMPLE_ONLY))
        )
        with gs.applied(c.model, transform), torch.no_grad():
            found = c.outputs()
        with torch.no_grad():
            wanted = c.outputs()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)  # float32 norms and attention split differently

    check()
