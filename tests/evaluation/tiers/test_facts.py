from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import gradsurgery as gs
from gradsurgery.data import load_tokenizer
from gradsurgery.errors import DataError
from gradsurgery.evaluation.tiers import fact_questions, fact_rows, planted_facts, recall, tier_recall
from gradsurgery.evaluation.tiers.facts import VALUES


class Knows(nn.Module):
    """Ranks first what follows in one of its sentences, token for token, and token 7 elsewhere."""

    def __init__(self, sentences: list[list[int]], vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.next = {tuple(s[:k]): s[k] for s in sentences for k in range(1, len(s))}
        self.vocabulary = vocabulary

    def forward(self, input_ids: torch.Tensor, use_cache: bool, attention_mask: Any = None) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for i, row in enumerate(input_ids.tolist()):
            for k in range(len(row)):
                logits[i, k, self.next.get(tuple(row[: k + 1]), 7)] = 1.0
        return SimpleNamespace(logits=logits)


def test_facts_are_distinct_and_repeatable() -> None:
    facts = planted_facts(500, seed=1)
    assert facts == planted_facts(500, seed=1) != planted_facts(500, seed=2)
    assert len({fact.subject for fact in facts}) == 500
    assert all(fact.value in VALUES[fact.attribute] for fact in facts)
    assert len({len(values) for values in VALUES.values()}) == 1
    for count in (0, 10**9, 2.0):
        with pytest.raises(DataError, match="is no number of facts"):
            planted_facts(count)  # type: ignore[arg-type]


def test_questions_mark_the_answers() -> None:
    tokenizer, facts = load_tokenizer(), planted_facts(20)
    ids, answers = fact_questions(facts, tokenizer)
    for fact, row, asked in zip(facts, ids, answers, strict=True):
        assert tokenizer.decode(row[asked]) == fact.answer
        assert tokenizer.decode(row[row >= 0][1:]) == fact.text and row[0] == tokenizer.eos_token_id


def test_rows_hold_every_fact() -> None:
    tokenizer, facts = load_tokenizer(), planted_facts(30)
    rows = fact_rows(facts, tokenizer, context=16, repeats=3)
    told = tokenizer.decode(rows.flatten().tolist())
    assert rows.shape[1] == 16 and sum(told.count(fact.text) for fact in facts) >= 3 * 30 - 2  # the last row is dropped
    assert torch.equal(rows, fact_rows(facts, tokenizer, context=16, repeats=3))
    with pytest.raises(DataError, match="do not fill one row of 4096 tokens"):
        fact_rows(facts, tokenizer, context=4096)


def test_recall_of_a_model_that_knows_a_part() -> None:
    tokenizer, facts = load_tokenizer(), planted_facts(8)
    questions = fact_questions(facts, tokenizer)
    sentences = [row[row >= 0].tolist() for row in questions[0]]
    found = recall(Knows(sentences[:6], len(tokenizer)), questions, batch_size=3)
    answers = questions[1].sum(1)
    assert found["exact"] == 6 / 8 and found["facts"] == 8
    assert found["top1"] == pytest.approx(int(answers[:6].sum()) / int(answers.sum()))


def test_one_wrong_token_spoils_an_exact_match() -> None:
    tokenizer = load_tokenizer()
    fact = next(f for f in planted_facts(100) if len(tokenizer(f.answer)["input_ids"]) > 2)
    ids, answers = fact_questions([fact], tokenizer)
    sentence = ids[0].tolist()
    model = Knows([sentence], len(tokenizer))
    last = int(answers[0].nonzero()[-1])
    model.next[tuple(sentence[:last])] = 9
    found = recall(model, (ids, answers))
    assert found["exact"] == 0.0 and found["top1"] == pytest.approx(1 - 1 / int(answers.sum()))


def test_what_c2_is_taught_c1_does_not_know() -> None:
    """A small model learns eight facts in C2 by heart, keyed entries alone."""
    torch.manual_seed(0)
    tokenizer, facts = load_tokenizer(), planted_facts(8)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=48, n_layer=2, n_head=4, n_positions=32)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    anatomy = gs.dissect(model)
    key = gs.PermutationKey.generate(anatomy, fraction=0.5, seed=0)
    ids = fact_questions(facts, tokenizer)[0]
    batch = {"input_ids": ids.clamp(min=0), "labels": ids, "attention_mask": (ids >= 0).long()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    surgery = gs.attach(gs.methods.private_finetune(key, anatomy, kl_weight=0.0), model, optimizer)
    for _ in range(60):
        surgery.backward({"private": batch})
        optimizer.step()
        optimizer.zero_grad()
    surgery.remove()
    found = tier_recall(model, key, anatomy, facts, tokenizer)
    assert found["C2"]["exact"] == 1.0 and found["C1"]["exact"] <= 1 / 8
