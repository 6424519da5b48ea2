"""Sets of entries against bool masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradsurgery.anatomy.entries import Entries, all_bits, bits_of, indices_of, span_of

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[int, list[int]]:
    dims = draw(st.lists(st.sampled_from(range(len(shape))), unique=True)) if shape else []
    return {d: draw(st.lists(st.integers(0, shape[d] - 1), max_size=shape[d])) for d in dims}


def mask_of(shape: tuple[int, ...], index: dict[int, list[int]]) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    for d, chosen in index.items():
        along = torch.zeros(shape[d], dtype=torch.bool)
        along[chosen] = True
        mask &= along.reshape([-1 if k == d else 1 for k in range(len(shape))])
    return mask


@st.composite
def pairs(draw: st.DrawFn, shape: tuple[int, ...], parts: int = 3) -> tuple[Entries, Tensor]:
    """A set built by unions, intersections and differences of boxes, and its mask."""
    out, mask = Entries.empty(shape), torch.zeros(shape, dtype=torch.bool)
    for _ in range(draw(st.integers(0, parts))):
        index = draw(boxes(shape))
        box, other = Entries.box(shape, index), mask_of(shape, index)
        op = draw(st.sampled_from("|&-^"))
        if op == "|":
            out, mask = out | box, mask | other
        elif op == "&":
            out, mask = out & box, mask & other
        elif op == "-":
            out, mask = out - box, mask & ~other
        else:
            out, mask = ~out | box, ~mask | other
    return out, mask


@given(SHAPES.flatmap(lambda shape: st.tuples(pairs(shape), pairs(shape))))
def test_algebra_is_that_of_masks(both: tuple[tuple[Entries, Tensor], tuple[Entries, Tensor]]) -> None:
    (a, mask_a), (b, mask_b) = both
    assert torch.equal(a.mask(), mask_a) and torch.equal(b.mask(), mask_b)
    assert torch.equal((a | b).mask(), mask_a | mask_b)
    assert torch.equal((a & b).mask(), mask_a & mask_b)
    assert torch.equal((a - b).mask(), mask_a & ~mask_b)
    assert torch.equal((~a).mask(), ~mask_a)
    assert a.numel() == int(mask_a.sum()) and bool(a) == bool(mask_a.any()) and a.whole == bool(mask_a.all())


@given(SHAPES.flatmap(lambda shape: st.tuples(pairs(shape), pairs(shape), pairs(shape))))
def test_laws_hold_as_values(three: tuple[tuple[Entries, Tensor], ...]) -> None:
    """Equal sets are equal values, however they were built."""
    (a, _), (b, _), (c, _) = three
    assert a | b == b | a and a & b == b & a
    assert (a | b) | c == a | (b | c) and (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c) and a | (b & c) == (a | b) & (a | c)
    assert ~(a | b) == ~a & ~b and ~~a == a
    assert a - b == a & ~b and (a - b) | (a & b) == a
    assert a | a == a and a & a == a and not a - a
    assert hash((a | b) - b) == hash(a - b)


@given(SHAPES.flatmap(lambda shape: st.tuples(pairs(shape), pairs(shape))))
def test_equality_is_canonical(both: tuple[tuple[Entries, Tensor], tuple[Entries, Tensor]]) -> None:
    (a, mask_a), (b, mask_b) = both
    assert (a == b) == torch.equal(mask_a, mask_b)


@given(SHAPES.flatmap(pairs))
def test_boxes_and_slices_cover_once(pair: tuple[Entries, Tensor]) -> None:
    entries, mask = pair
    counts = torch.zeros(entries.shape, dtype=torch.long)
    for box in entries.boxes():
        counts += Entries.from_box(entries.shape, box).mask().long()
    assert torch.equal(counts, mask.long())
    again = Entries.empty(entries.shape)
    for index in entries.slices():
        again |= Entries.box(entries.shape, index)
    assert again == entries


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_bits(case: tuple[int, set[int]]) -> None:
    size, chosen = case
    bits = bits_of(chosen, size)
    assert indices_of(bits).tolist() == sorted(chosen) and bits.bit_count() == len(chosen)
    assert bits_of(np.array(sorted(chosen), dtype=np.int64), size) == bits
    ordered = sorted(chosen)
    contiguous = bool(ordered) and ordered == list(range(ordered[0], ordered[-1] + 1))
    assert span_of(bits) == ((ordered[0], ordered[-1] + 1) if contiguous else None)
    assert all_bits(size) & bits == bits


def test_big_tensors_stay_small() -> None:
    shape = (28672, 8192)
    rows, columns = Entries.box(shape, {0: range(0, 28672, 2)}), Entries.box(shape, {1: range(64)})
    assert (rows | columns).numel() == 14336 * 8192 + 14336 * 64
    assert len((rows | columns).boxes()) == 2 and len((~rows).boxes()) == 1


def test_misfits_are_refused() -> None:
    with pytest.raises(IndexError, match=r"3\.\.4"):
        Entries.box((4,), {0: [3, 4]})
    with pytest.raises(IndexError):
        Entries.box((4,), {0: [-1]})
    with pytest.raises(ValueError, match="cannot be combined"):
        Entries.full((4,)) | Entries.full((5,))
