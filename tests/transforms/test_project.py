"""Projection against the definition in fp64: orthogonal, idempotent, never longer, at any scale, in every scope."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError, SlotError
from tests.transforms.vectors import SHAPES, Holder, Named, blocks_of, draw, flat, project_slowly, run

SCOPES = ("global", "module", "tensor", "row")
REMOVE = ("both", "conflict", "agreement")
EXPONENTS = st.tuples(*[st.integers(-12, 12)] * len(SHAPES))
LEVEL = {torch.float32: 1e-6, torch.float64: 1e-12}  # of |g| |r|: the rounding of sums and of the result


class Memory:
    """What a gradient memory shows."""

    def __init__(self, *vectors: Named) -> None:
        self.vectors = vectors


def check_block(g: Any, r: list[Any], left: Any, level: float, remove: str) -> None:
    """``left`` is ``g`` without what is to be removed: orthogonal, no longer, and nothing else is changed."""
    wanted = project_slowly(g, r, remove)
    assert (left - wanted).norm() <= level * g.norm()
    assert left.norm() <= g.norm() * (1 + level)
    for v in r:
        along = float(left @ v)
        small = level * float(v.norm() * max(left.norm(), 1e-3 * g.norm()))
        if remove == "both":
            assert abs(along) <= small
        assert along >= -small if remove == "conflict" else along <= small if remove == "agreement" else True


@given(st.integers(0, 10**6), EXPONENTS, EXPONENTS, st.sampled_from(SCOPES), st.sampled_from(REMOVE), st.booleans())
@settings(max_examples=120, deadline=None)
def test_what_is_left_is_orthogonal_and_applying_it_again_changes_nothing(
    seed: int, of_g: Any, of_r: Any, scope: Any, remove: Any, wide: bool
) -> None:
    dtype = torch.float64 if wide else torch.float32
    g, r = draw(seed, of_g, dtype), draw(seed + 1, of_r, dtype)
    once, _ = run(gs.project(remove=remove, scope=scope), g, {"protect": r}, dtype)
    twice, _ = run(gs.project(remove=remove, scope=scope), once, {"protect": r}, dtype)
    for block in blocks_of(scope):
        vectors = [flat(x, block) for x in (g, r, once, twice)]
        check_block(vectors[0], [vectors[1]], vectors[2], LEVEL[dtype], remove)
        assert (vectors[3] - vectors[2]).norm() <= LEVEL[dtype] * vectors[0].norm()


@given(st.integers(0, 10**6), st.sampled_from(SCOPES), st.integers(-12, 6), st.integers(-12, 6))
@settings(max_examples=60, deadline=None)
def test_entries_whose_squares_leave_fp32_count_all_the_same(seed: int, scope: Any, of_g: int, of_r: int) -> None:
    g = draw(seed, [of_g] * len(SHAPES), torch.float32, spread=12)
    r = draw(seed + 1, [of_r] * len(SHAPES), torch.float32, spread=12)
    left, _ = run(gs.project(scope=scope), g, {"protect": r})
    for block in blocks_of(scope):
        check_block(flat(g, block), [flat(r, block)], flat(left, block), 1e-6, "both")


@given(st.integers(0, 10**6), st.sampled_from(SCOPES), st.sampled_from(REMOVE), st.integers(-12, 12))
@settings(max_examples=60, deadline=None)
def test_bf16_is_computed_wide_and_rounded_once(seed: int, scope: Any, remove: Any, exponent: int) -> None:
    g = draw(seed, [exponent] * len(SHAPES), torch.bfloat16)
    r = draw(seed + 1, [0] * len(SHAPES), torch.bfloat16)
    left, _ = run(gs.project(remove=remove, scope=scope), g, {"protect": r}, torch.bfloat16)
    for block in blocks_of(scope):
        before, after = flat(g, block), flat(left, block)
        wanted = project_slowly(before, [flat(r, block)], remove)
        slack = 1e-6 * float(before.norm())  # an entry on the border of two roundings
        assert ((after - wanted).abs() <= wanted.abs() * 2.0**-8 * 1.001 + slack).all()


@given(st.floats(0, 1), st.integers(0, 10**6), st.sampled_from([1e-3, 1e-5, 1e-7]))
@settings(max_examples=40, deadline=None)
def test_a_gradient_that_is_nearly_the_reference_leaves_what_it_has_beside_it(
    scale: float, seed: int, apart: float
) -> None:
    r, other = draw(seed, [0] * len(SHAPES), torch.float64), draw(seed + 1, [0] * len(SHAPES), torch.float64)
    g = {name: ((scale + 0.5) * r[name] + apart * other[name]).float() for name in SHAPES}
    low = {name: value.float() for name, value in r.items()}
    left, _ = run(gs.project(), g, {"protect": low})
    (block,) = blocks_of("global")
    cosine = flat(left, block) @ flat(low, block) / flat(left, block).norm() / flat(low, block).norm()
    assert abs(float(cosine)) <= 1e-6
    assert (flat(left, block) - project_slowly(flat(g, block), [flat(low, block)])).norm() <= 1e-7 * flat(
        g, block
    ).norm()


@given(
    st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(SCOPES), st.sampled_from(REMOVE), st.booleans(), EXPONENTS
)
@settings(max_examples=80, deadline=None)
def test_several_references_span_a_subspace_or_bound_a_cone(
    seed: int, count: int, scope: Any, remove: Any, dependent: bool, exponents: Any
) -> None:
    g = draw(seed, [0] * len(SHAPES), torch.float32)
    refs = [draw(seed + k + 1, [exponents[k]] * len(SHAPES), torch.float32) for k in range(count)]
    if dependent:
        refs.append({name: -2.0 * value for name, value in refs[0].items()})
    if remove != "both" and scope == "row":
        scope = "module"  # the oracle tries all sets of constraints
    left, _ = run(gs.project(away_from=["first", Memory(*refs[1:])], remove=remove, scope=scope), g, {"first": refs[0]})
    for block in blocks_of(scope):
        before, vectors = flat(g, block), [flat(r, block) for r in refs]
        if len(before) > len(refs):  # a cone or span may be all there is; then zero is left, and its rounding
            check_block(before, vectors, flat(left, block), 2e-6, remove)


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_energy_chooses_the_leading_directions_of_the_references(seed: int, energy: float, count: int) -> None:
    g = draw(seed, [0] * len(SHAPES), torch.float64)
    refs = [draw(seed + k + 1, [0] * len(SHAPES), torch.float64) for k in range(count)]
    left, _ = run(gs.project(away_from=Memory(*refs), energy=energy), g, {}, torch.float64)
    (block,) = blocks_of("global")
    u, values, _ = torch.linalg.svd(torch.stack([flat(r, block) for r in refs], 1), full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum()
    rank = int((share < energy - 1e-12).sum()) + 1
    before = flat(g, block)
    assert (flat(left, block) - (before - u[:, :rank] @ (u[:, :rank].T @ before))).norm() <= 1e-10 * before.norm()


@given(
    st.integers(0, 10**6), st.floats(0.01, 1.0), st.floats(-2, 2), st.floats(-2, 2), st.sampled_from(SCOPES),
    st.sampled_from(REMOVE),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_weights_and_the_cosine_clip_are_those_of_the_formula(
    seed: int, limit: float, keep: float, weight: float, scope: Any, remove: Any
) -> None:
    g, r = draw(seed, [0] * len(SHAPES), torch.float64), draw(seed + 1, [3] * len(SHAPES), torch.float64)
    transform = gs.project(
        remove=remove, scope=scope, max_cosine=limit, keep_weight=keep, removed_weight=weight, park="parked"
    )
    left, context = run(transform, g, {"protect": r}, torch.float64)
    parked: Any = dict(context.slots).get("parked", {})
    full = {name: parked.get(name, torch.zeros_like(g[name])) for name in SHAPES}
    for block in blocks_of(scope):
        x, y = flat(g, block), flat(r, block)
        cosine = float(x @ y / x.norm() / y.norm())
        counted = max(min(cosine, limit), -limit)
        if (remove == "conflict" and counted > 0) or (remove == "agreement" and counted < 0):
            counted = 0.0
        removed = weight * counted * x.norm() / y.norm() * y
        assert (flat(left, block) - (keep * x - removed)).norm() <= 1e-10 * x.norm()
        assert (flat(full, block) - removed).norm() <= 1e-10 * x.norm()


def test_what_is_parked_adds_to_what_is_there() -> None:
    g, r, old = (draw(k, [0] * len(SHAPES), torch.float32) for k in range(3))
    left, context = run(gs.project(park="parked"), g, {"protect": r, "parked": old})
    for name in SHAPES:
        total = left[name] + context.slots["parked"][name]
        assert torch.allclose(total, g[name] + old[name], atol=1e-5)


@given(st.integers(0, 10**6), st.sets(st.sampled_from(sorted(SHAPES))), st.sets(st.sampled_from(sorted(SHAPES))),
       st.sampled_from(SCOPES))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_missing_gradient_counts_as_zero_and_is_made_where_something_is_removed(
    seed: int, without_g: set[str], without_r: set[str], scope: Any
) -> None:
    g, r = draw(seed, [0] * len(SHAPES), torch.float64), draw(seed + 1, [0] * len(SHAPES), torch.float64)
    given = {name: value for name, value in g.items() if name not in without_g}
    refs = {name: value for name, value in r.items() if name not in without_r}
    transform = gs.project(scope=scope)
    if not given:
        with pytest.raises(SlotError, match="no parameter has a gradient"):
            run(transform, given, {"protect": refs}, torch.float64)
        return
    left, _ = run(transform, given, {"protect": refs}, torch.float64)
    whole = {name: given.get(name, torch.zeros_like(g[name])) for name in SHAPES}
    for block in blocks_of(scope):
        r_ = flat({name: refs.get(name, torch.zeros_like(r[name])) for name in SHAPES}, block)
        wanted = project_slowly(flat(whole, block), [r_])
        found = flat({name: left.get(name, torch.zeros_like(g[name])) for name in SHAPES}, block)
        assert (found - wanted).norm() <= 1e-12 * (1 + flat(whole, block).norm())
    if scope in ("tensor", "row"):
        assert set(left) == set(given)
    for name in set(left) - set(given):
        assert name in refs


def region_of(model: Holder, names: str, entries: Any = None) -> gs.Region:
    found = gs.region(model, names)
    return found if entries is None else gs.Region(found.space, entries)


@given(st.integers(0, 10**6), st.sampled_from(["global", "module", "tensor", "row", "region"]), st.data())
@settings(max_examples=60, deadline=None)
def test_entries_outside_a_region_are_neither_read_nor_changed(seed: int, scope: Any, data: Any) -> None:
    from gradsurgery.anatomy.entries import Entries

    model = Holder(dtype=torch.float64)
    masks, entries = {}, {}
    for name, shape in SHAPES.items():
        index = {d: data.draw(st.sets(st.integers(0, n - 1))) for d, n in enumerate(shape)}
        if all(index.values()):
            entries[name] = Entries.box(shape, {d: sorted(i) for d, i in index.items()})
            masks[name] = entries[name].mask()
    if not entries:
        return
    region = gs.Region(gs.anatomy.space.ParameterSpace.of(model), entries)
    other = ~region
    regions: Any = [region, other] if scope == "region" and other.numel() else region
    g, r = draw(seed, [0] * len(SHAPES), torch.float64), draw(seed + 1, [0] * len(SHAPES), torch.float64)
    left, _ = run(gs.project(scope=scope, region=regions), g, {"protect": r}, torch.float64, model)
    for which in [masks, {n: ~masks.get(n, torch.zeros(s).bool()) for n, s in SHAPES.items()}]:
        inside = [{n: x[n] * which.get(n, torch.zeros(SHAPES[n])) for n in SHAPES} for x in (g, r, left)]
        if which is not masks and not isinstance(regions, list):
            assert all(torch.equal(inside[0][name], inside[2][name]) for name in SHAPES)
            continue
        for block in blocks_of("global" if scope == "region" else scope):
            wanted = project_slowly(flat(inside[0], block), [flat(inside[1], block)])
            assert (flat(inside[2], block) - wanted).norm() <= 1e-12 * (1 + wanted.norm())


def test_references_that_vanish_remove_nothing_and_are_counted() -> None:
    g, r = draw(0, [0] * len(SHAPES), torch.float32), draw(1, [0] * len(SHAPES), torch.float32)
    r["a.weight"].zero_()
    r["a.bias"].mul_(1e-6)
    left, context = run(gs.project(scope="tensor"), g, {"protect": r})
    assert context.metrics["project/protect/vanished"] == 1
    assert torch.equal(left["a.weight"], g["a.weight"])
    assert not torch.equal(left["a.bias"], g["a.bias"])
    left, context = run(gs.project(scope="tensor", floor=1e-3), g, {"protect": r})
    assert context.metrics["project/protect/vanished"] == 2
    assert torch.equal(left["a.bias"], g["a.bias"])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("count", [1, 2])
def test_metrics_say_what_was_there_and_what_is_left(scope: Any, count: int) -> None:
    g = draw(0, [0] * len(SHAPES), torch.float64)
    refs = [draw(k + 1, [0] * len(SHAPES), torch.float64) for k in range(count)]
    slots = {f"r{k}": r for k, r in enumerate(refs)}
    left, context = run(gs.project(away_from=list(slots), scope=scope, metrics="module"), g, slots, torch.float64)
    head = f"project/main/{'+'.join(slots)}"
    places = {"": list(SHAPES)} | {f"/module/{m}": [n for n in SHAPES if n.startswith(m)] for m in "abc"}
    for place, names in places.items():
        block = [(name, ...) for name in names]
        x, y = flat(g, block), flat(left, block)
        units = torch.linalg.qr(torch.stack([flat(r, block) for r in refs], 1))[0]

        def cosine(v: Any, units: Any = units, block: Any = block) -> float:
            if count > 1:
                return float((units.T @ v).norm() / v.norm())
            return float(v @ flat(refs[0], block) / v.norm() / flat(refs[0], block).norm())

        assert context.metrics[f"{head}/cosine_before{place}"] == pytest.approx(cosine(x), abs=1e-9)
        assert context.metrics[f"{head}/cosine_after{place}"] == pytest.approx(cosine(y), abs=1e-9)
        assert context.metrics[f"{head}/norm_removed{place}"] == pytest.approx(float((x - y).norm() / x.norm()))
    _, context = run(gs.project(scope=scope), g, {"protect": refs[0]}, torch.float64)
    assert list(context.metrics) == ["project/protect/vanished"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("where", ["main", "protect", "second"])
def test_nan_and_inf_are_errors_that_name_slot_and_parameter(value: float, scope: Any, where: str) -> None:
    g, r, s = (draw(k, [0] * len(SHAPES), torch.float32) for k in range(3))
    {"main": g, "protect": r, "second": s}[where]["b.experts"][1, 2, 3] = value
    with pytest.raises(SlotError, match=rf"slot '{where}' holds nan or inf in 'b.experts'"):
        run(gs.project(away_from=["protect", "second"], scope=scope), g, {"protect": r, "second": s})


def test_a_slot_that_was_not_filled_is_an_error_and_an_empty_memory_is_not() -> None:
    g = draw(0, [0] * len(SHAPES), torch.float32)
    with pytest.raises(SlotError, match=r"'protect' was not filled in this step .filled: main.*into='protect'"):
        run(gs.project(), g, {})
    left, _ = run(gs.project(away_from=Memory()), g, {})
    assert all(torch.equal(left[name], g[name]) for name in SHAPES)
    for vector, match in (({"z.weight": torch.ones(1)}, "which the model does not have"),
                          ({"a.bias": torch.ones(6)}, r"is \[6\], the parameter \[5\]")):  # fmt: skip
        with pytest.raises(SlotError, match=match):
            run(gs.project(away_from=Memory(vector)), g, {})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"remove": "conflicts"}, "remove is one of 'both', 'conflict', 'agreement', not 'conflicts'"),
        ({"scope": "layer"}, "scope is one of"),
        ({"metrics": "all"}, "metrics is one of"),
        ({"at": "step"}, "at is 'gradient' or 'update'"),
        ({"at": "update", "slot": "x"}, "an update is of the parameters"),
        ({"at": "update", "park": "x"}, "cannot be parked"),
        ({"slot": "protect"}, "away from itself"),
        ({"slot": ""}, "slot is the name of a slot"),
        ({"away_from": []}, "names no slot"),
        ({"park": "protect"}, "nothing can be parked there"),
        ({"park": "main"}, "nothing can be parked there"),
        ({"away_from": 3.0}, "takes names of slots"),
        ({"away_from": [{"a": 1}]}, "takes names of slots"),
        ({"energy": 0.0}, "energy lies above 0"),
        ({"energy": 1.5}, "energy lies above 0"),
        ({"energy": 0.5, "remove": "conflict"}, "energy chooses a subspace"),
        ({"max_cosine": 0.0}, "max_cosine lies above 0"),
        ({"max_cosine": 0.5, "away_from": ["a", "b"]}, "with several vectors there is none"),
        ({"keep_weight": float("nan")}, "keep_weight is a finite number"),
        ({"removed_weight": "1"}, "removed_weight is a finite number"),
        ({"floor": -1.0}, "floor is a share"),
        ({"scope": "region"}, "give them as region="),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        gs.project(**options)


def test_regions_that_overlap_or_are_empty_are_refused() -> None:
    model = Holder()
    one, other = gs.region(model, "a.*"), gs.region(model, "a.weight")
    with pytest.raises(PlanError, match="overlap"):
        gs.project(scope="region", region=[one, other])
    with pytest.raises(SelectionError, match="empty"):
        gs.project(region=one - one)
