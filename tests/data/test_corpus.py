import json
import re

import datasets
import pytest

from gradsurgery.data import attribution, load_bilingual
from gradsurgery.errors import DataError


@pytest.fixture(scope="module")
def embedded():
    return load_bilingual()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ids(split):
    return {d.id for d in split.train} | {d.id for d in split.validation}


def test_the_embedded_corpus_is_whole_and_aligned(embedded):
    assert list(embedded) == ["en", "es"]
    assert [len(ids(embedded[c])) for c in embedded] == [5214, 5214]
    assert [d.id for d in embedded["en"].train] == [d.id for d in embedded["es"].train]
    assert [d.id for d in embedded["en"].validation] == [d.id for d in embedded["es"].validation]
    assert len(embedded["en"].validation) == 238
    assert "In the beginning God created" in embedded["en"].train[0].text
    assert "En el principio crió Dios" in embedded["es"].train[0].text


def test_every_embedded_sentence_is_attributed(embedded):
    credits = attribution()
    everyday = {i for i in ids(embedded["en"]) if i.startswith("tatoeba/")}
    assert set(credits) == everyday
    form = re.compile(r"\d+ \S.*")
    for of_document in credits.values():
        assert len(of_document["en"]) == len(of_document["es"]) == 24
        assert all(form.fullmatch(credit) for language in of_document.values() for credit in language)


def test_limit_and_share(embedded):
    few = load_bilingual(limit=50, validation=0.2)
    assert [len(ids(few[c])) for c in few] == [50, 50]
    assert ids(few["en"]) == ids(few["es"]) <= ids(embedded["en"])
    with pytest.raises(DataError, match="limit=0"):
        load_bilingual(limit=0)


def test_a_folder_has_a_file_or_a_folder_for_each_category(tmp_path):
    write(tmp_path / "en.jsonl", [{"id": str(i), "text": f"row {i}"} for i in range(5)])
    (tmp_path / "es.txt").write_text("\n\n".join(f"fila {i}" for i in range(5)))
    write(tmp_path / "fr" / "a.jsonl", [{"text": "un"}, {"text": "deux"}])
    (tmp_path / "fr" / "b.txt").write_text("trois")
    (tmp_path / "README.md").write_text("ignored")
    corpus = load_bilingual(tmp_path)
    assert list(corpus) == ["en", "es", "fr"]
    assert ids(corpus["en"]) == ids(corpus["es"]) == set("01234")
    assert ids(corpus["fr"]) == {"a/0", "a/1", "b/0"}


def test_one_file_may_hold_all_categories(tmp_path):
    write(tmp_path / "named.jsonl", [{"text": "a", "category": "bio"}, {"text": "b", "category": "rest"}])
    assert list(load_bilingual(tmp_path / "named.jsonl")) == ["bio", "rest"]
    write(tmp_path / "pairs.jsonl", [{"en": "one", "es": "uno"}, {"en": "two", "es": "  "}])
    pairs = load_bilingual(tmp_path / "pairs.jsonl")
    assert ids(pairs["en"]) == {"0", "1"}
    assert ids(pairs["es"]) == {"0"}
    write(tmp_path / "zoo.jsonl", [{"text": "a"}])
    assert list(load_bilingual(tmp_path / "zoo.jsonl")) == ["zoo"]


TINYSTORIES = {"text": ["Once", "Twice", "Thrice"], "text_es": ["Una vez", "Dos veces", "Tres veces"]}


def test_saved_data_sets(tmp_path):
    part = datasets.Dataset.from_dict(TINYSTORIES)
    datasets.DatasetDict({"train": part, "validation": part.select([0])}).save_to_disk(str(tmp_path / "both"))
    corpus = load_bilingual(tmp_path / "both")
    assert ids(corpus["en"]) == ids(corpus["es"]) == {"train/0", "train/1", "train/2", "validation/0"}
    part.remove_columns("text_es").save_to_disk(str(tmp_path / "each" / "en"))
    part.remove_columns("text").save_to_disk(str(tmp_path / "each" / "es"))
    assert list(load_bilingual(tmp_path / "each")) == ["en", "es"]

    arrow = next((tmp_path / "both" / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged or truncated saved data set"):
        load_bilingual(tmp_path / "both")


def test_the_hub(monkeypatch):
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(TINYSTORIES)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_bilingual("hub:ffuuugor/tinystories-spanish", limit=2)
    assert asked == ["ffuuugor/tinystories-spanish"]
    assert ids(corpus["en"]) == ids(corpus["es"]) == {"train/0", "train/1"}

    def offline(name):
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"ConnectionError: no route\); offline, give local files instead") as error:
        load_bilingual("hub:ffuuugor/tinystories-spanish")
    assert "\n" not in str(error.value)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(DataError, match="does not exist: give"):
        load_bilingual(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds no \.txt"):
        load_bilingual(tmp_path)
    write(tmp_path / "en.jsonl", [{"title": "no text"}])
    with pytest.raises(DataError, match="en: row 0 has no text"):
        load_bilingual(tmp_path)
    write(tmp_path / "en.jsonl", [{"text": "  "}])
    with pytest.raises(DataError, match="holds no document"):
        load_bilingual(tmp_path)
    (tmp_path / "en.txt").write_text("twice")
    with pytest.raises(DataError, match="two files for category 'en'"):
        load_bilingual(tmp_path)
