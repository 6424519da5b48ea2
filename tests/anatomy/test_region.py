"""Regions of a model against bool masks, one a parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import SelectionError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.layer = nn.Linear(4, 3)
        self.head = nn.Linear(4, 6, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.head.weight = self.table.weight


MODEL = Tied()
SPACE = ParameterSpace.of(MODEL)
Masks = dict[str, Tensor]


def masks_of(region: gs.Region) -> Masks:
    return {name: region.of(name).mask() for name in SPACE.shapes}


@st.composite
def regions(draw: st.DrawFn) -> gs.Region:
    entries = {}
    for name in draw(st.sets(st.sampled_from([*SPACE.shapes, *SPACE.aliases]))):
        shape = SPACE.shapes[SPACE.canonical(name)]
        index = {d: draw(st.lists(st.integers(0, n - 1))) for d, n in enumerate(shape) if draw(st.booleans())}
        entries[name] = Entries.box(shape, index)
    return gs.Region(SPACE, entries, draw(st.sampled_from(["", "a", "b"])))


def equal(one: Masks, other: Masks) -> bool:
    return all(torch.equal(one[name], other[name]) for name in SPACE.shapes)


@settings(deadline=None)
@given(regions(), regions())
def test_algebra_is_that_of_masks(a: gs.Region, b: gs.Region) -> None:
    left, right = masks_of(a), masks_of(b)
    assert equal(masks_of(a | b), {n: left[n] | right[n] for n in left})
    assert equal(masks_of(a & b), {n: left[n] & right[n] for n in left})
    assert equal(masks_of(a - b), {n: left[n] & ~right[n] for n in left})
    assert equal(masks_of(~a), {n: ~left[n] for n in left})
    assert a.numel() == sum(int(m.sum()) for m in left.values())
    assert (a == b) == equal(left, right) and (a in b) == all(not (left[n] & ~right[n]).any() for n in left)
    assert a == ~~a and (a | ~a) == gs.Region.whole(SPACE) and not (a & ~a)
    assert a.fraction == pytest.approx(a.numel() / 40) and bool(a) == (a.numel() > 0)
    if a == b:
        assert hash(a) == hash(b)


@settings(deadline=None)
@given(regions())
def test_slices_make_up_the_region(region: gs.Region) -> None:
    parts: dict[str, Entries] = {}
    for name, index in region.slices:
        box = Entries.box(SPACE.shapes[name], index)
        assert not (parts.get(name, Entries.empty(box.shape)) & box)
        parts[name] = parts[name] | box if name in parts else box
    assert gs.Region(SPACE, parts) == region
    assert set(region.parameters()) == {name for name, mask in masks_of(region).items() if mask.any()}


def test_tied_weights_are_one() -> None:
    one = gs.region(MODEL, "head.weight")
    assert one == gs.region(MODEL, "table") and one.numel() == 24 and one.parameters() == ("table.weight",)
    assert "head.weight" in one and "table.weight" in one and "layer.weight" not in one
    assert gs.Region.whole(SPACE).numel() == 24 + 12 + 3 + 1


def test_misfits_are_refused() -> None:
    other = gs.region(nn.Linear(3, 3), "weight")
    region = gs.region(MODEL, "layer")
    for combine in (lambda: region | other, lambda: other & region, lambda: region - other):
        with pytest.raises(SelectionError, match="another model"):
            combine()
    with pytest.raises(SelectionError, match="no parameter"):
        gs.Region(SPACE, {"layer.gain": Entries.full((3,))})
    with pytest.raises(SelectionError, match=r"\[3\]"):
        gs.Region(SPACE, {"layer.bias": Entries.full((4,))})
    with pytest.raises(SelectionError, match="no parameter"):
        "layer.gain" in region  # noqa: B015
    assert region != other and region != "layer"


@pytest.mark.parametrize("rows", [3, 20_000])
def test_a_region_without_a_name_has_a_digest(rows: int) -> None:
    """Also where a dimension has more entries than Python writes decimals; equal regions have equal ones."""
    space = ParameterSpace.of(nn.Embedding(rows, 2))
    made = [gs.Region(space, {"weight": Entries.box((rows, 2), {0: range(start, rows, 2)})}) for start in (0, 0, 1)]
    assert len(made[0].digest) == 8
    assert made[0].digest == made[1].digest != made[2].digest
    assert made[0].digest in gs.freeze(made[0]).describe()
