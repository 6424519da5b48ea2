"""Text and tokens of a policy-gradient run: a tokenizer for sums, answered questions as rows and as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gradsurgery.runs.quarantine_controls import Pair, placebo_of
from gradsurgery.runs.quarantine_grpo import GrpoConfig
from gradsurgery.runs.quarantine_grpo_task import Question, Task

Answered = Sequence[tuple[str, str]]


def sums_tokenizer(marks: Sequence[str]) -> PreTrainedTokenizerFast:
    """Digits, signs and words as single tokens; ends a text with ``<end>``, pads with ``<pad>`` on the left."""
    words = ["<pad>", "<end>", *"0123456789+=>?", *dict.fromkeys(["no", *marks])]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<end>", padding_side="left"
    )


class PolicyRows:
    """What a run reads and writes as tokens.

    Args:
        config: Of the run.
        task: Its questions.
        tokenizer: Of the policy.
    """

    def __init__(self, config: GrpoConfig, task: Task, tokenizer: Any) -> None:
        self.config, self.task, self.tokenizer = config, task, tokenizer

    def prompt(self, text: str) -> str:
        """A question as the policy reads it."""
        if not self.config.chat:
            return text
        chat = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def encode(self, answered: Answered, whole: bool = False) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, on answers or on ``whole`` rows; padded on the right."""
        rows = []
        for question, answer in answered:
            before = self.tokenizer(self.prompt(question), add_special_tokens=False)["input_ids"]
            after = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            rows.append((before, [*after, self.tokenizer.eos_token_id]))
        shape = (len(rows), max(len(before) + len(after) for before, after in rows))
        ids, mask, labels = (torch.full(shape, value) for value in (0, 0, -100))
        for k, (before, after) in enumerate(rows):
            row = torch.tensor([*before, *after])
            ids[k, : len(row)], mask[k, : len(row)] = row, 1
            start = 0 if whole else len(before)
            labels[k, start : len(row)] = row[start:]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def sequences(self, answered: Answered) -> Tensor:
        """Token ids ``[rows, longest]``, below 0 where there is none."""
        found = self.encode(answered, whole=True)
        return found["labels"].masked_fill(found["attention_mask"] == 0, -1)

    def pairs(self, count: int) -> tuple[list[Pair], list[Pair]]:
        """Sums answered by a claim and rightly, and placebo pairs of right answers."""
        sums = self.task.draw(count, "pairs", "sum")
        unwanted = [self.encode([one]) for one in self.task.hacked(sums, "pairs")]
        wanted = [self.encode([(q.text, q.answer)]) for q in sums]
        return list(zip(unwanted, wanted, strict=True)), placebo_of(wanted, self.task.seed)

    def data_set(self) -> Dataset:
        """The questions of the training, each once; TRL repeats them."""
        policy = self.config.policy
        asked = self.task.draw(policy.prompts * policy.steps, "training")
        return Dataset.from_dict({"prompt": [self.prompt(q.text) for q in asked], "answer": [q.answer for q in asked]})

    def right(self, questions: Sequence[Question]) -> list[tuple[str, str]]:
        return [(q.text, q.answer) for q in questions]
