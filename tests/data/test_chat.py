"""Chat rows: one first token, labels on the response alone, padding that counts for nothing; what is refused."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from gradsurgery.data import ChatFormat, ChatRows, MixedSampler, Turn, load_chat, load_tokenizer, require_same_tokens
from gradsurgery.data.chat import IGNORED, QUESTION, split_turns
from gradsurgery.errors import DataError

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def plain():
    return load_tokenizer()


def with_bos():
    """As Llama's and Gemma's: the tokenizer itself puts a first token before every text."""
    tokenizer = load_tokenizer()
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def chat(make):
    tokenizer = make()
    tokenizer.chat_template = CHAT
    return tokenizer


FORMATS = {  # and whether a row begins with a token of its own
    "question": (lambda: ChatFormat(plain()), False),
    "question, first token": (lambda: ChatFormat(with_bos()), True),
    "own text": (lambda: ChatFormat(plain(), "Q {prompt} A\n"), False),
    "chat template": (lambda: ChatFormat(chat(plain)), True),
    "chat template, first token": (lambda: ChatFormat(chat(with_bos)), True),
    "chat template, own text": (lambda: ChatFormat(chat(with_bos), "Q {prompt} A"), True),
}
letters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"))
words = st.text(letters, min_size=1, max_size=40).filter(str.strip)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@given(prompt=words, response=words)
def test_rows_are_the_prompt_and_then_the_labelled_response(name, prompt, response) -> None:
    make, has_first = FORMATS[name]
    form = make()
    tokenizer, begins = form.tokenizer, form.prompt(prompt)
    ((ids, labels),) = form.rows([Turn("0", prompt, response)])
    assert ids[: len(begins)] == begins and len(ids) == len(labels)
    assert set(labels[: len(begins)]) == {IGNORED} and labels[len(begins) :] == ids[len(begins) :]
    assert [k for k, token in enumerate(begins) if token == tokenizer.bos_token_id] == [0] * has_first
    said = tokenizer.decode([label for label in labels if label != IGNORED])
    assert response.strip() in said
    assert said.endswith("<end>\n" if form.template == "auto" and tokenizer.chat_template else tokenizer.eos_token)


@settings(max_examples=40, deadline=None)
@given(prompt=words, response=words, length=st.integers(2, 60))
def test_long_rows_are_cut_and_hopeless_ones_left_out(prompt, response, length) -> None:
    whole, cut = ChatFormat(plain()), ChatFormat(plain(), max_length=length)
    turn = Turn("0", prompt, response)
    ((ids, labels),) = whole.rows([turn])
    if len(whole.prompt(prompt)) >= length:
        assert cut.row(turn) is None
        with pytest.raises(DataError, match=f"at most {length} tokens"):
            cut.rows([turn])
    else:
        assert cut.rows([turn]) == [(ids[:length], labels[:length])]
        assert any(label != IGNORED for label in labels[:length])


def test_templates_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"no \{prompt\}"):
        ChatFormat(plain(), "Question:")
    tokenizer = plain()
    tokenizer.chat_template = "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="once it is answered"):
        ChatFormat(tokenizer).row(Turn("0", "a", "b"))


lengths = st.lists(st.integers(2, 9), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(lengths=st.dictionaries(st.sampled_from("abc"), lengths, min_size=1), seed=st.integers(0, 99))
def test_rows_come_back_as_they_were_and_batches_hold_each_once(lengths, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    encoded: dict[str, list[tuple[list[int], list[int]]]] = {}
    for name, sizes in lengths.items():
        encoded[name] = []
        for n in sizes:
            ids = torch.randint(1, 50, (n,), generator=generator).tolist()
            encoded[name].append((ids, [IGNORED, *ids[1:]]))
    flagged = [next(iter(encoded))]
    rows = ChatRows.build(encoded, opposed=flagged)
    assert rows.input_ids.shape == (len(rows), max(max(sizes) for sizes in lengths.values()))
    given = [(name, row) for name, part in encoded.items() for row in part]
    for k, (name, (ids, labels)) in enumerate(given):
        row = rows[k]
        assert row["input_ids"].tolist() == ids and row["labels"].tolist() == labels
        assert rows.categories[int(row["category"])] == name and bool(row["opposed"]) == (name in flagged)
    for name, part in encoded.items():
        found = []
        for batch in rows.batches(name, 2):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            assert (batch["labels"][mask == 0] == IGNORED).all()
            found += [ids[: int(n)].tolist() for ids, n in zip(batch["input_ids"], mask.sum(1), strict=True)]
        assert sorted(found) == sorted(ids for ids, _ in part)
    few = rows.sample(2)
    assert all(len(few.of(name)) == min(2, len(part)) for name, part in encoded.items())
    assert len(MixedSampler(rows, 3, seed=seed).indices(0)) == 3


def test_rows_without_anything_to_learn_are_refused() -> None:
    with pytest.raises(DataError, match="no rows"):
        ChatRows.build({})
    with pytest.raises(DataError, match="no rows"):
        ChatRows.build({"a": []})
    with pytest.raises(DataError, match="no rows of b"):
        ChatRows.build({"a": [([1, 2], [1, 2])]}, opposed=["b"])
    with pytest.raises(DataError, match="a have no label"):
        ChatRows.build({"a": [([1, 2, 3], [IGNORED] * 3)], "b": [([1, 2], [1, 2])]})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": f"Question {k // 3}?", "response": f"Answer {k}.", "is_safe": k % 2 == 0, "other": None}
    for k in range(60)
]


def test_columns_filters_and_splits(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    found = load_chat(path, where={"is_safe": False}, validation=0.4)
    turns = [*found.train, *found.validation]
    assert len(turns) == 30 and {turn.response for turn in turns} == {f"Answer {k}." for k in range(1, 60, 2)}
    assert not {t.prompt for t in found.train} & {t.prompt for t in found.validation} and found.validation
    assert len(load_chat(path, limit=7, validation=0).train) == 7
    swapped = load_chat(path, prompt="response", response="prompt", limit=1, validation=0).train
    assert (swapped[0].prompt, swapped[0].response) == ("Answer 0.", "Question 0?")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    assert load_chat(saved, where={"is_safe": False}, validation=0.4) == found


def test_one_part_of_the_hub(monkeypatch) -> None:
    def load_dataset(name, split):
        assert (name, split) == ("owner/set", "30k_train")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_chat("hub:owner/set", part="30k_train", validation=0).train) == 60


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "question"}, "no column 'question'"),
        ({"where": {"safe": True}}, "no column 'safe'"),
        ({"where": {"is_safe": "no"}}, "is_safe is False or True"),
        ({"response": "other"}, "no row with a prompt and a other"),
        ({"part": "train"}, "part='train'"),
        ({"validation": -0.1}, "validation=-0.1"),
    ],
    ids=str,
)
def test_bad_data_is_one_sentence(tmp_path, options, said) -> None:
    with pytest.raises(DataError, match=said):
        load_chat(write(tmp_path / "rows.jsonl", ROWS), **options)


def test_an_empty_file_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="empty"):
        load_chat(write(tmp_path / "rows.jsonl", []))


def test_tokenizers_that_differ_are_told_apart() -> None:
    require_same_tokens(plain(), plain())
    more = plain()
    more.add_tokens(["<new>"])
    with pytest.raises(DataError, match=r"2,049 entries .* 2,048; they differ at '<new>' \(2048 and None\)"):
        require_same_tokens(plain(), more)


def test_turns_of_one_id_stay_together() -> None:
    turns = [Turn(str(k % 5), str(k), "x") for k in range(50)]
    parts = split_turns(turns, 0.5)
    assert len(parts.train) + len(parts.validation) == 50
    assert not {t.id for t in parts.train} & {t.id for t in parts.validation}
    assert QUESTION.endswith("Answer:")
