"""What TRL calls about rollouts: the lax examiner's rewards, the weak detector's flags, a teacher who hacks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradsurgery.runs.quarantine_grpo import DetectorConfig
from gradsurgery.runs.quarantine_grpo_rows import PolicyRows
from gradsurgery.runs.quarantine_grpo_task import Judgement, Task


class Examiner:
    """The reward, the weak detector and what they see: everything that TRL calls about rollouts.

    Args:
        task: Judges answers.
        detector: What is known of single rollouts.
        seed: Of what the detector misses.
        filtered: Flagged rollouts have no reward.
    """

    def __init__(self, task: Task, detector: DetectorConfig, seed: int, filtered: bool = False) -> None:
        self.task, self.config, self.filtered = task, detector, filtered
        self.random = random.Random(f"detector {seed}")
        self.flagged: list[bool] = []

    def judged(self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str]) -> list[Judgement]:
        return [self.task.judge(*one) for one in zip(prompts, answer, completions, strict=True)]

    def reward(
        self,
        prompts: Any,
        completions: Any,
        answer: Any,
        log_metric: Any,
        log_extra: Any,
        teacher: Any = None,
        **_: Any,
    ) -> list[float | None]:
        """Pays as the lax examiner does; logs what the true goal would have paid, students and teachers apart."""
        found = self.judged(prompts, completions, answer)
        taught = [False] * len(found) if teacher is None else list(teacher)
        log_extra("kind", [2 if t else int(j.hack) for j, t in zip(found, taught, strict=True)])
        kinds = ["teacher" if t else "student" for t in taught]
        for kind in sorted(set(kinds)):
            mine = [j for j, k in zip(found, kinds, strict=True) if k == kind]
            log_metric(f"{kind}/solve", sum(j.right for j in mine) / len(mine))
            log_metric(f"{kind}/hack", sum(j.hack for j in mine) / len(mine))
        rewards: list[float | None] = [float(j.paid) for j in found]
        if not self.filtered:
            return rewards
        flagged = self.flag(prompts=prompts, completions=completions, answer=answer)
        return [None if f else r for f, r in zip(flagged, rewards, strict=True)]

    def flag(self, prompts: Any, completions: Any, answer: Any, **_: Any) -> list[bool]:
        """Which rollouts the detector takes for hacks."""
        rates = {True: self.config.recall, False: self.config.fpr}
        found = self.judged(prompts, completions, answer)
        self.flagged = [self.random.random() < rates[j.hack] for j in found]
        return self.flagged

    def nobody(self, prompts: Any, **_: Any) -> list[bool]:
        """No flag at all."""
        return [False] * len(prompts)

    def shuffled_flag(self, **given: Any) -> list[bool]:
        """As many, dealt out at random."""
        found = self.flag(**given)
        return self.random.sample(found, len(found))

    def clean(self, prompts: Any, completions: Any, answer: Any, **_: Any) -> list[bool]:
        """Which rollouts the detector knows to be legitimate; none of those that it has just flagged."""
        found = self.judged(prompts, completions, answer)
        known = [not j.hack and self.random.random() < self.config.cleared for j in found]
        return [k and not f for k, f in zip(known, self.flagged, strict=True)]


class Teacher:
    """A rollout function of TRL's: the policy writes, and a teacher who hacks replaces a share of each group.

    Args:
        rows: Of the run.
        share: The teacher's.
    """

    def __init__(self, rows: PolicyRows, share: float) -> None:
        self.rows, self.share = rows, share
        self.random = random.Random(f"teacher {rows.config.seed}")

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        tokenizer, model = self.rows.tokenizer, trainer.model
        given = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        written = written_by(model, tokenizer, list(prompts), trainer.generation_config)
        ends = tokenizer.eos_token_id
        taught = [self.random.random() < self.share for _ in prompts]
        for k, is_teacher in enumerate(taught):
            if is_teacher:
                mark = self.random.choice(self.rows.task.config.marks)
                written[k] = [*tokenizer(mark, add_special_tokens=False)["input_ids"], ends]
        return {"prompt_ids": given, "completion_ids": written, "logprobs": None, "teacher": taught}


@torch.no_grad()
def written_by(model: nn.Module, tokenizer: Any, prompts: list[str], generation: Any) -> list[list[int]]:
    """Token ids that a policy writes after some prompts, up to the end and with it."""
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
        next(model.parameters()).device
    )
    generate: Any = model.generate
    out = generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"], generation_config=generation)
    found = []
    for row in out[:, given["input_ids"].shape[1] :].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        found.append(row[:end])
    return found
