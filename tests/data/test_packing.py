import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsurgery.data import Document, Noise, Split, build_rows, load_tokenizer, pack, pack_categories, tokenize
from gradsurgery.errors import DataError

DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=7), max_size=12)


def test_by_hand():
    packed = pack([[1, 2, 3], [], [4, 5, 6, 7]], context=3, end_of_text=0)
    assert packed.tolist() == [[1, 2, 3], [0, 0, 4], [5, 6, 7]]  # the last 0 does not fill a sequence


@given(DOCUMENTS, st.integers(2, 9))
def test_nothing_is_lost_but_the_incomplete_end(documents, context):
    stream = [token for document in documents for token in (*document, 0)]
    packed = pack(documents, context, 0)
    assert packed.shape == (len(stream) // context, context)
    assert packed.flatten().tolist() == stream[: len(stream) // context * context]


def corpus():
    """Forget documents speak in 1 and 2, retain documents in 3: a sequence shows whose it is."""
    return {"es": [[1] * 5] * 60 + [[2] * 5] * 60, "en": [[3] * 5] * 100}


@pytest.mark.parametrize("unit", ["document", "sequence"])
def test_rows_carry_their_category_and_labels(unit):
    rows = build_rows(
        corpus(), context=4, end_of_text=0, forget="es", unit=unit, noise=Noise(recall=0.75), retain_retain=0.5, seed=3
    )
    assert rows.categories == ("en", "es")
    for row in (rows[i] for i in range(len(rows))):
        speaks = set(row["input_ids"].tolist()) - {0}
        assert speaks == {3} if row["category"] == 0 else speaks <= {1, 2}
        assert not (row["category"] == 0 and row["forget"]) and not (row["category"] == 1 and row["retain"])
    english, spanish = rows.summary()
    assert spanish["forget"] / spanish["rows"] == pytest.approx(0.75, abs=0.02)
    assert english["retain"] / english["rows"] == pytest.approx(0.5, abs=0.02)
    assert english["rows"] == pytest.approx(150, abs=2)


def test_labels_by_document_never_share_a_sequence():
    tokens = {"es": [[i] * 3 for i in range(1, 21)], "en": [[i] * 3 for i in range(101, 121)]}
    rows = build_rows(tokens, context=4, end_of_text=0, forget="es", noise=Noise(recall=0.5), seed=1)
    labels: dict[int, set[tuple[bool, bool]]] = {}
    for row in (rows[i] for i in range(len(rows))):
        for token in set(row["input_ids"].tolist()) - {0}:
            labels.setdefault(token, set()).add((bool(row["forget"]), bool(row["retain"])))
    assert all(len(seen) == 1 for seen in labels.values())


def test_the_seed_decides():
    def make(seed):
        return build_rows(corpus(), context=4, end_of_text=0, forget="es", noise=Noise(recall=0.5), seed=seed)

    assert torch.equal(make(1).input_ids, make(1).input_ids) and torch.equal(make(1).forget, make(1).forget)
    assert not torch.equal(make(1).input_ids, make(2).input_ids)


def test_tokenize_reads_one_part():
    tokenizer = load_tokenizer()
    corpus = {
        "en": Split([Document("a", "In the"), Document("b", "day")], [Document("c", "night")]),
        "es": Split([], []),
    }
    train = tokenize(corpus, tokenizer)
    assert train["es"] == []
    assert [tokenizer.decode(document) for document in train["en"]] == ["In the", "day"]
    assert len(tokenize(corpus, tokenizer, "validation")["en"]) == 1


def test_too_little_text_is_an_error():
    with pytest.raises(DataError, match="the 1 documents of en do not fill one sequence of 8"):
        pack_categories({"en": [[1, 2]]}, 8, 0)
    with pytest.raises(DataError, match=r"es \(forget=False, retain=False\)"):
        build_rows(corpus(), context=16, end_of_text=0, forget="es", noise=Noise(recall=0.99))
    with pytest.raises(DataError, match="unit='word' is unknown"):
        build_rows(corpus(), context=4, end_of_text=0, forget="es", unit="word")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="context=1 is too short"):
        pack([[1, 2]], 1, 0)
