"""The rows of a run of WaRP: what teaches the behaviour, what it is measured on, the task and its problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsurgery.data import ChatFormat, ChatRows, Document, Turn, TurnSplit, load_chat, load_kinds, load_questions
from gradsurgery.data.split import Split
from gradsurgery.errors import PlanError
from gradsurgery.runs.opposed import ChatConfig
from gradsurgery.runs.setup import build_tokenizer
from gradsurgery.runs.warp import WarpConfig

PROTECTED, TASK = "protected", "task"
SHIPPED = {"gsm8k_100": Path(__file__).parents[1] / "data" / "assets" / "gsm8k_100.jsonl.bz2"}


@dataclass(frozen=True)
class WarpRows:
    """Rows of a run.

    Attributes:
        tokenizer: The model's.
        behaviour: Rows of phase 0: the protected behaviour, and what is answered.
        protected: Rows that bases and importances are estimated from.
        task: Rows that the variants train on.
        held: Held-back rows: protected, task, and each topic that is answered.
        prompts: Held-back prompts, protected and answered, as token ids.
        problems: Held-back prompts of the task, as token ids.
        answers: What is right there.
    """

    tokenizer: Any
    behaviour: ChatRows
    protected: ChatRows
    task: ChatRows
    held: ChatRows
    prompts: dict[str, list[list[int]]]
    problems: list[list[int]]
    answers: list[str]

    @property
    def answered(self) -> list[str]:
        """Topics that are answered, and should stay so."""
        return [name for name in self.prompts if name != PROTECTED]


def load_rows(config: WarpConfig, tokenizer: Any | None) -> WarpRows:
    """Rows for a given model's tokenizer, or for one that is made of the training part.

    Raises:
        PlanError: a topic that is named twice, or nothing to protect.
        DataError: data that cannot be used.
    """
    protected, answered = _behaviour(config)
    task = _task(config)
    if tokenizer is None:
        seen = [*protected.train, *(t for part in answered.values() for t in part.train), *task.train]
        texts = [Document(t.id, f"{t.prompt}\n{t.response}") for t in seen]
        tokenizer = build_tokenizer(config.behaviour.tokenizer, {"all": Split(texts, [])})
    form = ChatFormat(tokenizer, config.template, config.context)
    both = {PROTECTED: protected, **answered}
    learned = {name: form.rows(part.train, name) for name, part in both.items()}
    held = {name: form.rows(part.validation, f"held-back {name}") for name, part in {**both, TASK: task}.items()}
    trained = _spread(form.rows(task.train, TASK), config.task_samples)
    problems = _spread(_fitting(form, task.validation), config.test_prompts)
    prompts = {name: _spread(_fitting(form, part.validation), config.test_prompts) for name, part in both.items()}
    return WarpRows(
        tokenizer,
        behaviour=ChatRows.build(learned),
        protected=ChatRows.build({PROTECTED: learned[PROTECTED]}),
        task=ChatRows.build({TASK: trained}),
        held=ChatRows.build(held).sample(config.test_rows),
        prompts={name: [ids for ids, _ in part] for name, part in prompts.items()},
        problems=[ids for ids, _ in problems],
        answers=[response for _, response in problems],
    )


def _behaviour(config: WarpConfig) -> tuple[TurnSplit, dict[str, TurnSplit]]:
    """What is protected, and what is answered besides."""
    if config.protected is not None:
        return _load(config.protected, config), {}
    topics = config.glosses
    names = [*topics.refused, *topics.answered]
    if not topics.refused or (twice := {name for name in names if names.count(name) > 1}):
        raise PlanError(
            f"topic {', '.join(sorted(twice))} is named twice: it is refused or answered."
            if topics.refused
            else "glosses.refused names no topic, so there is nothing to protect."
        )
    found = load_questions(names, refused=topics.refused, validation=config.validation, limit=topics.limit)
    return _joined([found[name] for name in topics.refused]), {name: found[name] for name in topics.answered}


def _task(config: WarpConfig) -> TurnSplit:
    if config.task is not None:
        return _load(config.task, config)
    found = load_kinds(config.glosses.task, validation=config.validation, limit=config.glosses.limit)
    return _joined(list(found.values()))


def _load(one: ChatConfig, config: WarpConfig) -> TurnSplit:
    if one.source in SHIPPED:
        where = {"lang": config.language}
        one = dataclasses.replace(
            one, source=str(SHIPPED[one.source]), prompt="question", response="answer", where=where
        )
    columns: dict[str, Any] = {"prompt": one.prompt, "response": one.response, "where": one.where, "part": one.part}
    return load_chat(one.source, **columns, validation=config.validation, limit=one.limit)


def _joined(parts: Sequence[TurnSplit]) -> TurnSplit:
    train: list[Turn] = [turn for part in parts for turn in part.train]
    return TurnSplit(train, [turn for part in parts for turn in part.validation])


def _fitting(form: ChatFormat, turns: Sequence[Turn]) -> list[tuple[list[int], str]]:
    """Different prompts as token ids, with their responses; those as long as a row are left out."""
    different = {turn.prompt: turn.response for turn in turns}
    encoded = [(form.prompt(prompt), response) for prompt, response in different.items()]
    return [(ids, response) for ids, response in encoded if len(ids) < form.max_length]


def _spread(items: list[Any], count: int | None) -> list[Any]:
    """At most ``count`` of them, evenly."""
    count = min(len(items), len(items) if count is None else count)
    return [items[k * len(items) // count] for k in range(count)]
