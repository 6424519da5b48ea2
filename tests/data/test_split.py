import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsurgery.data import Document, split
from gradsurgery.data.split import held_back
from gradsurgery.errors import DataError


@given(st.lists(st.text(max_size=8), unique=True), st.floats(0, 0.99))
def test_every_document_lands_on_one_side_and_translations_together(ids, share):
    english = split([Document(i, "en") for i in ids], share)
    spanish = split([Document(i, "es") for i in reversed(ids)], share)
    assert sorted(d.id for d in english.train + english.validation) == sorted(ids)
    assert {d.id for d in english.validation} == {d.id for d in spanish.validation}
    assert [d.id for d in english.train] == [i for i in ids if not held_back(i, share)]


@given(st.text(max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_back_what_a_smaller_one_does(document, a, b):
    assert not held_back(document, min(a, b)) or held_back(document, max(a, b))


def test_the_share_is_about_met_and_never_changes():
    ids = [f"doc/{i}" for i in range(4000)]
    assert 0.08 < sum(held_back(i, 0.1) for i in ids) / 4000 < 0.12
    assert [i for i in range(60) if held_back(f"doc/{i}", 0.1)] == [9, 27]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_are_checked(share):
    with pytest.raises(DataError, match="is no share"):
        split([], share)
