"""Streamed inner products and combinations against exact sums, over the whole range of fp32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsurgery.tensors import Difference, dots, inner_products, row_products, subtract_, subtract_rows_

SEEDS = st.integers(0, 10**6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def vector(seed: int, size: int, low: int, high: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries over many orders of magnitude, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(size, generator=generator, dtype=torch.float64)
    value *= 10.0 ** torch.randint(low, high + 1, (size,), generator=generator)
    value *= torch.rand(size, generator=generator) > 0.2
    limit = torch.finfo(dtype).max / 4
    return value.clamp(-limit, limit).to(dtype)


def exact(a: Tensor, b: Tensor) -> float:
    return math.fsum((a.double() * b.double()).tolist())


@given(
    SEEDS, st.integers(1, 70), st.integers(-45, 37), st.integers(0, 40), DTYPES, st.integers(1, 3), st.integers(1, 9)
)
@settings(max_examples=120, deadline=None)
def test_inner_products_are_exact_to_the_rounding_of_the_norms(
    seed: int, size: int, low: int, spread: int, dtype: torch.dtype, count: int, block: int
) -> None:
    vectors = [vector(seed + k, size, low, min(low + spread, 37), dtype) for k in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dots.BLOCK, "cpu", block)
        pair = inner_products(vectors[:2])  # read together, in fp32 where that is safe
        found = inner_products([*vectors, None])
    assert found.dtype == torch.float64 and not found[-1].any() and not found[:, -1].any()
    norms = [math.sqrt(exact(v, v)) for v in vectors]
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            assert abs(float(found[i, j]) - exact(a, b)) <= 1e-6 * norms[i] * norms[j]
            if max(i, j) < 2:
                assert abs(float(pair[i, j]) - exact(a, b)) <= 1e-6 * norms[i] * norms[j]


@given(SEEDS, st.integers(1, 40), st.integers(-8, 3))
@settings(max_examples=40, deadline=None)
def test_differences_are_taken_exactly(seed: int, size: int, exponent: int) -> None:
    before = vector(seed, size, 0, 0)
    after = before + vector(seed + 1, size, exponent, exponent)
    r = vector(seed + 2, size, -3, 3)
    found = inner_products([Difference(after, before), r])
    delta = after.double() - before.double()
    assert float(found[0, 1]) == pytest.approx(exact(delta, r), abs=1e-14 * float(delta.norm() * r.double().norm()))
    assert float(found[0, 0]) == pytest.approx(exact(delta, delta), rel=1e-14)


@given(SEEDS, st.integers(1, 6), st.sampled_from([(), (3,), (2, 3)]), st.integers(1, 3), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_rows_are_summed_by_themselves(seed: int, rows: int, rest: Any, count: int, block: int) -> None:
    size = rows * math.prod(rest)
    vectors = [vector(seed + k, size, -12, 12).view(rows, *rest) for k in range(count)]
    given: list[Any] = [*vectors, Difference(vectors[0], torch.ones_like(vectors[0])), None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dots.BLOCK, "cpu", block)
        found = row_products(given)
    wide = [*[v.double() for v in vectors], vectors[0].double() - 1, torch.zeros_like(vectors[0]).double()]
    for k in range(rows):
        for i, a in enumerate(wide):
            for j, b in enumerate(wide):
                scale = float(a[k].norm() * b[k].norm())
                assert abs(float(found[k, i, j]) - exact(a[k].reshape(-1), b[k].reshape(-1))) <= 1e-12 * scale


@given(SEEDS, st.integers(1, 40), DTYPES, st.lists(st.floats(-3, 3), max_size=3), st.sampled_from([1.0, 0.0, -0.7]),
       st.integers(-36, 36), st.integers(1, 9), st.booleans())  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_combinations_are_rounded_once(
    seed: int,
    size: int,
    dtype: torch.dtype,
    factors: list[float],
    keep: float,
    exponent: int,
    block: int,
    strided: bool,
) -> None:
    """Also where the factor alone leaves fp32: 1e36 times a vector of 1e-36."""
    wide = dtype not in (torch.float16,)
    scale = 10.0**exponent if wide else 1.0
    target = vector(seed, 2 * size, -1, 1, dtype)
    target = target[::2] if strided else target[:size].clone()
    before = target.double().clone()
    vectors = [(vector(seed + k + 1, size, -1, 1, torch.float64) / scale).to(dtype) for k in range(len(factors))]
    scaled = [f * scale for f in factors]
    wanted = keep * before - sum((f * v.double() for f, v in zip(scaled, vectors, strict=True)), torch.zeros(size))
    size_of = abs(keep) * before.abs() + sum(
        (abs(f) * v.double().abs() for f, v in zip(scaled, vectors, strict=True)), torch.zeros(size)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dots.BLOCK, "cpu", block)
        subtract_(target, vectors, scaled, keep)
    half = torch.finfo(dtype).eps / 2
    inner = 2e-7 if dtype != torch.float64 else 1e-15
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((target.double() - wanted).abs() <= 1.001 * half * wanted.abs() + inner * size_of.abs() + tiny).all()


@given(SEEDS, st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.sampled_from([1.0, -0.5]), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_combinations_by_row(seed: int, rows: int, width: int, count: int, keep: float, block: int) -> None:
    target = vector(seed, rows * width, -1, 1).view(rows, width)
    before = target.double().clone()
    vectors = [vector(seed + k + 1, rows * width, -1, 1).view(rows, width) for k in range(count)]
    factors = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dots.BLOCK, "cpu", block)
        subtract_rows_(target, vectors, factors, keep)
    wanted = keep * before
    for k, v in enumerate(vectors):
        wanted = wanted - factors[:, k : k + 1] * v.double()
    assert ((target.double() - wanted).abs() <= 1e-7 * wanted.abs() + 1e-12).all()


def test_nothing_of_the_size_of_the_vectors_is_allocated() -> None:
    a, b = torch.randn(1 << 20), torch.randn(1 << 20)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        inner_products([a, b])
        subtract_(a, [b], [0.5])
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest <= 4 * dots.BLOCK["cpu"]
