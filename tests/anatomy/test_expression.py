"""The text form of selections: what a selection says of itself reads back as itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.errors import SelectionError
from tests.anatomy.anatomies import anatomy_of

INDEX = st.one_of(
    st.integers(-2, 2),
    st.lists(st.integers(-2, 2), min_size=1, max_size=3),
    st.builds(
        slice, st.none() | st.integers(-3, 3), st.none() | st.integers(-3, 3), st.none() | st.sampled_from([1, 2])
    ),
)
LAYERS = st.one_of(st.integers(-3, 2), st.builds(slice, st.none() | st.integers(0, 1), st.none() | st.integers(2, 3)))


@st.composite
def leaves(draw: st.DrawFn, anatomy: gs.Anatomy) -> gs.Region:
    kind = draw(st.sampled_from(["heads", "kv_groups", "neurons", "names", "structure"]))
    if kind == "names":
        return anatomy.region(draw(st.sampled_from(["*norm*", "model.layers.1.mlp", "o_proj"])))
    if kind == "structure":
        return anatomy.structure("norm")
    units = getattr(anatomy, kind)[draw(LAYERS), draw(INDEX)]
    if draw(st.booleans()) and units:
        units = units.named("model.layers.*")
    return anatomy.rest(units) if draw(st.booleans()) and units else units


def selections(anatomy: gs.Anatomy) -> st.SearchStrategy[gs.Region]:
    def grown(inner: st.SearchStrategy[gs.Region]) -> st.SearchStrategy[gs.Region]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda p: p[0] | p[1]),
            pairs.map(lambda p: p[0] & p[1]),
            pairs.map(lambda p: p[0] - p[1]),
            inner.map(lambda r: ~r),
        )

    return st.recursive(leaves(anatomy), grown, max_leaves=5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mixtral"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_text_reads_back(name: str, data: st.DataObject) -> None:
    anatomy = anatomy_of(name)
    region = data.draw(selections(anatomy))
    again = anatomy.select(region.text)
    assert again == region and type(again) is type(region) and again.text == region.text
    if isinstance(region, gs.Units):
        assert again.chosen == region.chosen  # type: ignore[attr-defined]


def test_examples() -> None:
    anatomy = anatomy_of("mixtral")
    forget = anatomy.heads[:, -1:] | anatomy.neurons[:, -4:]
    assert forget.text == "heads[:, -1:] | neurons[:, -4:]" and anatomy.select(forget.text) == forget
    assert anatomy.select("~rest(kv_groups[0, 0])") == ~anatomy.rest(anatomy.kv_groups[0, 0])
    assert anatomy.select("neurons.named('*experts.1')[:, [0, 2]]") == anatomy.neurons.named("*experts.1")[:, [0, 2]]
    assert anatomy.select("units_within(region('model.layers.1.mlp'))").count > 0  # type: ignore[attr-defined]
    assert anatomy.select("all - structure('embedding', 'norm')") == ~anatomy.structure("embedding", "norm")
    assert anatomy.select("all") == gs.Region.whole(anatomy.space)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "head[:, 0]",
        "heads[:, 0",
        "heads[0]",
        "heads[:, a]",
        "heads[:, 0.5]",
        "heads[:, 'x']",
        "heads.count",
        "heads.named",
        "heads[:, 0] + heads[:, 1]",
        "'heads'",
        "3",
        "rest",
        "rest()",
        "rest(3)",
        "named('x')",
        "heads.named(3)",
        "heads[:, 0] | 3",
        "~3",
        "region()",
        "region(3)",
        "structure(heads)",
        "(~heads)[:, 0]",
        "__import__('os').system('true')",
        "heads[:, __import__('os').getpid()]",
        "region('no_such_parameter')",
        "experts.named('x' * 3)",
        "save('x')",
    ],
)
def test_what_is_no_selection(text: str) -> None:
    with pytest.raises(SelectionError):
        anatomy_of("mixtral").select(text)
