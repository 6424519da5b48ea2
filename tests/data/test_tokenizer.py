import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsurgery.data import load_bilingual, load_tokenizer, train_tokenizer
from gradsurgery.errors import DataError

TOKENIZER = load_tokenizer()


def test_the_embedded_one_has_2048_entries_and_an_end_of_text():
    assert len(TOKENIZER) == 2048
    assert (TOKENIZER.eos_token, TOKENIZER.eos_token_id) == ("<|endoftext|>", 0)
    assert TOKENIZER.pad_token_id == 0


@given(st.text())
def test_every_text_survives(text):
    if "<|endoftext|>" not in text:
        assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_both_languages_cost_about_the_same():
    corpus = load_bilingual(limit=200)
    tokens = {c: sum(len(TOKENIZER(d.text)["input_ids"]) for d in corpus[c].train) for c in corpus}
    assert 0.8 < tokens["es"] / tokens["en"] < 1.25


def test_training_is_deterministic_and_saves_as_stock(tmp_path):
    texts = ["the cat and the hat", "el gato y el sombrero"] * 20
    one, two = (train_tokenizer(texts, vocab_size=280) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    assert len(one) == 280
    one.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json")("the cat")["input_ids"] == one("the cat")["input_ids"]


def test_the_embedded_one_is_what_its_code_trains():
    corpus = load_bilingual()
    texts = [d.text for split in corpus.values() for d in split.train]
    assert train_tokenizer(texts).get_vocab() == TOKENIZER.get_vocab()


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="vocab_size=200 is too small"):
        train_tokenizer(["a"], vocab_size=200)
    with pytest.raises(DataError, match="is not a file"):
        load_tokenizer(tmp_path / "nothing.json")
