"""Refusal rates: the detector's own figures, generation that padding does not change, responses scored by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
from gradsurgery.data import ChatRows, load_tokenizer
from gradsurgery.data.chat import IGNORED
from gradsurgery.errors import BatchError, DataError
from gradsurgery.evaluation import RefusalDetector, continuations, refusal_rate, score_responses

VOCABULARY = 64


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, eos_token_id=0, **shape))


def gpt_neo() -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    config = GPTNeoConfig(vocab_size=VOCABULARY, max_position_embeddings=64, window_size=8, eos_token_id=0, **shape)
    config.initializer_range = 0.3
    return GPTNeoForCausalLM(config)


MODELS = {"llama": llama, "gpt_neo": gpt_neo}
prompts = st.lists(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12), min_size=1, max_size=6)


class Numbers:
    """Tokens as numbers; 0 pads and ends."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(i)) for i in ids if int(i))


class TestDetector:
    def test_on_the_shipped_set(self) -> None:
        score = RefusalDetector.shipped().measured()
        assert (score.true_positives, score.false_negatives) == (24, 0)
        assert (score.false_positives, score.true_negatives) == (0, 40)
        assert score.precision == score.recall == 1

    @given(
        markers=st.lists(st.sampled_from(["no", "cannot", "sorry,"]), min_size=1),
        texts=st.lists(st.tuples(st.text("nocatsry, ", max_size=12), st.booleans()), min_size=1),
    )
    def test_counts_add_up(self, markers, texts) -> None:
        detector = RefusalDetector(tuple(markers))
        score = detector.measured(texts)
        hits = [any(marker in text for marker in markers) for text, _ in texts]
        pairs = list(zip(hits, (refusal for _, refusal in texts), strict=True))
        assert [score.true_positives, score.false_positives] == [pairs.count((True, True)), pairs.count((True, False))]
        assert [score.false_negatives, score.true_negatives] == [
            pairs.count((False, True)),
            pairs.count((False, False)),
        ]
        row = score.row()
        assert row["refusals"] + row["answers"] == len(texts)
        assert (row["precision"] != row["precision"]) == (not any(hits))

    def test_case_and_apostrophes_make_no_difference(self) -> None:
        detector = RefusalDetector(("I'm sorry",))
        assert all(map(detector, ("I’M SORRY, no", "well, i`m sorry", "I'm sorry")))

    @pytest.mark.parametrize("markers", [(), ("",), ("no", " ")])
    def test_markers_that_mean_nothing_are_refused(self, markers) -> None:
        with pytest.raises(DataError, match="needs markers"):
            RefusalDetector(markers)

    def test_nothing_labelled(self) -> None:
        with pytest.raises(DataError, match="no labelled text"):
            RefusalDetector.shipped().measured([])


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None)
@given(prompts=prompts, size=st.integers(1, 7))
def test_padding_and_batches_change_nothing(name, prompts, size) -> None:
    """The oracle continues each prompt alone, by hand, without a cache; ties within rounding are left out."""
    model = MODELS[name]().double().train()
    found = continuations(model, Numbers(), prompts, max_new_tokens=4, batch_size=size)
    assert model.training and found == continuations(
        model, Numbers(), [" ".join(map(str, p)) for p in prompts], 4, size
    )
    model.eval()
    for prompt, text in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 4:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 0:
                    break
        assert Numbers().decode(ids[len(prompt) :], True) == text


@settings(max_examples=10, deadline=None)
@given(prompts=prompts, marker=st.integers(1, VOCABULARY - 1))
def test_the_rate_is_the_share_of_refused_texts(prompts, marker) -> None:
    detector = RefusalDetector((str(marker),))
    found = refusal_rate(llama(), Numbers(), prompts, detector, max_new_tokens=5, batch_size=2)
    assert found.refused == tuple(str(marker) in text for text in found.texts)
    assert found.rate == sum(found.refused) / len(prompts) and found.detector == detector.measured()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: refusal_rate(llama(), Numbers(), []), "no prompt"),
        (lambda: continuations(llama(), Numbers(), [[1], []]), "prompt 1 is empty"),
        (lambda: continuations(llama(), Numbers(), [[1]], batch_size=0), "batch_size=0"),
        (lambda: continuations(torch.nn.Linear(2, 2), Numbers(), [[1]]), "no generate"),
    ],
)
def test_bad_input(call, said) -> None:
    with pytest.raises(DataError, match=said):
        call()


def rows_of(draw_lengths, seed=0) -> ChatRows:
    generator = torch.Generator().manual_seed(seed)
    encoded: dict[str, list[tuple[list[int], list[int]]]] = {}
    for name, sizes in draw_lengths.items():
        encoded[name] = []
        for prompt, response in sizes:
            ids = torch.randint(1, VOCABULARY, (prompt + response,), generator=generator).tolist()
            encoded[name].append((ids, [IGNORED] * prompt + ids[prompt:]))
    return ChatRows.build(encoded)


sizes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=10, deadline=None)
@given(lengths=st.dictionaries(st.sampled_from("ab"), sizes, min_size=1), size=st.integers(1, 5))
def test_losses_and_divergences_are_those_of_single_rows(name, lengths, size) -> None:
    model, rows = MODELS[name](), rows_of(lengths)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = score_responses(model, rows, gs.losses.frozen(other), batch_size=size)
    for category in rows.categories:
        loss, kl, tokens = 0.0, 0.0, 0
        for k in rows.of(category).tolist():
            row = rows[k]
            mine, theirs = (
                m.eval()(input_ids=row["input_ids"][None]).logits[0].detach().double().log_softmax(-1)
                for m in (model, other)
            )
            for t in range(1, len(row["labels"])):
                if (label := int(row["labels"][t])) >= 0:
                    loss -= float(mine[t - 1, label])
                    kl += float((theirs[t - 1].exp() * (theirs[t - 1] - mine[t - 1])).sum())
                    tokens += 1
        assert found[category]["tokens"] == tokens
        assert found[category]["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert found[category]["kl"] == pytest.approx(kl / tokens, rel=1e-4, abs=1e-6)
    assert "kl" not in score_responses(model, rows)[rows.categories[0]]


def test_responses_without_labels_or_with_another_vocabulary_are_refused() -> None:
    rows = rows_of({"a": [(2, 3)]})
    torch.manual_seed(0)
    bigger = LlamaForCausalLM(
        LlamaConfig(vocab_size=70, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(BatchError, match="70"):
        score_responses(llama(), rows, gs.losses.frozen(bigger))
    empty = ChatRows(**{**vars(rows), "labels": torch.full_like(rows.labels, IGNORED)})
    with pytest.raises(DataError, match="'a' holds nothing"):
        score_responses(llama(), empty)


def test_a_real_tokenizer_reads_what_it_writes() -> None:
    tokenizer = load_tokenizer()
    (text,) = continuations(llama(), tokenizer, [[5, 6]], max_new_tokens=3)
    assert isinstance(text, str) and tokenizer.eos_token not in text
