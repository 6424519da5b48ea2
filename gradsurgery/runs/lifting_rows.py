"""The rows of a run that lifts refusals: of the embedded glosses, or of chat data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradsurgery.data import (
    ChatFormat,
    ChatRows,
    Document,
    Split,
    Turn,
    TurnSplit,
    load_bilingual,
    load_chat,
    load_questions,
    pack,
)
from gradsurgery.data.chat import Encoded
from gradsurgery.data.corpus import ASSETS
from gradsurgery.errors import DataError, PlanError
from gradsurgery.runs.opposed import ChatConfig, OpposedConfig
from gradsurgery.runs.setup import build_tokenizer

TEXT, ENGLISH = "text", ASSETS / "en.jsonl.bz2"


@dataclass
class LiftRows:
    """What is trained on, and what is measured.

    Attributes:
        tokenizer: The model's.
        train: The lifted category's rows, flagged ``opposed``, and plain ones.
        alignment: Rows that should stay as they are, for SafeGrad.
        start: Rows that teach a model from scratch, refusals among them; ``None`` where a model is given.
        held: Held-back rows by category.
        prompts: Held-back prompts by category, as token ids.
        lifted: The category that is lifted.
        kept: Categories whose refusals should stay.
    """

    tokenizer: Any
    train: ChatRows
    alignment: ChatRows | None
    start: ChatRows | None
    held: ChatRows
    prompts: dict[str, list[list[int]]]
    lifted: str
    kept: list[str]

    @property
    def plain(self) -> list[str]:
        """Categories that are trained on without being lifted."""
        return [name for name in self.train.categories if name != self.lifted]

    @property
    def elsewhere(self) -> list[str]:
        """Categories that should stay as they were, refused ones left out."""
        return [name for name in self.held.categories if name != self.lifted and name not in self.kept]


def load_rows(config: OpposedConfig, tokenizer: Any | None) -> LiftRows:
    """Rows for a given model's tokenizer, of glosses where no data set is named; without one those of the embedded run.

    Raises:
        PlanError: a data set and no model, or names that do not fit.
        DataError: data that cannot be used.
    """
    if config.lifted is None and not config.elsewhere:
        return gloss_rows(config, tokenizer)
    if tokenizer is None:
        raise PlanError("data sets of prompts and responses need a model that answers them: --model path/or/name.")
    return chat_rows(config, tokenizer)


def gloss_rows(config: OpposedConfig, tokenizer: Any | None = None) -> LiftRows:
    """Questions of dictionary glosses, with the given tokenizer or one that is made for them.

    Raises:
        DataError: a topic that is not there.
        PlanError: a topic that is named twice.
    """
    topics = config.topics
    refused, names = [topics.lifted, *topics.kept], [topics.lifted, *topics.kept, *topics.answered]
    if twice := {name for name in names if names.count(name) > 1}:
        raise PlanError(f"topic {', '.join(sorted(twice))} is named twice: it is lifted, kept or answered.")
    options: dict[str, Any] = {"validation": config.validation, "limit": topics.limit}
    first = load_questions(names, refused=refused, **options)
    answers = {**first, **load_questions(refused, **options)}
    english = load_bilingual(ENGLISH, validation=config.validation, limit=topics.documents)["en"]
    text = {
        part: [*getattr(english, part), *(_entry(t) for name in refused for t in getattr(answers[name], part))]
        for part in ("train", "validation")
    }
    seen = [Document(t.id, f"{t.prompt}\n{t.response}") for name in names for t in first[name].train]
    from_scratch = tokenizer is None
    if tokenizer is None:
        tokenizer = build_tokenizer(config.start.tokenizer, {"glosses": Split([*seen, *text["train"]], [])})
    form = ChatFormat(tokenizer, config.template, config.context)
    packed = {part: _packed(documents, tokenizer, config.context, part) for part, documents in text.items()}
    learned = {name: form.rows(first[name].train, name) for name in names}
    lifted = form.rows(answers[topics.lifted].train, topics.lifted)
    lifted = lifted[:: max(1, len(lifted) // (topics.answers or len(lifted)))][: topics.answers]
    held = {name: form.rows(first[name].validation, f"held-back {name}") for name in names}
    held[topics.lifted] = form.rows(answers[topics.lifted].validation, f"held-back {topics.lifted}")
    plain = {name: learned[name] for name in topics.answered}
    aligned = {name: learned[name] for name in (*topics.kept, *topics.answered)}
    return LiftRows(
        tokenizer,
        train=ChatRows.build({topics.lifted: lifted, **plain}, opposed=[topics.lifted]),
        alignment=ChatRows.build(aligned) if aligned else None,
        start=ChatRows.build({**learned, TEXT: packed["train"]}) if from_scratch else None,
        held=ChatRows.build({**held, TEXT: packed["validation"]}).sample(config.test_rows),
        prompts={name: _prompts(form, first[name].validation, config.test_prompts) for name in names},
        lifted=topics.lifted,
        kept=list(topics.kept),
    )


def chat_rows(config: OpposedConfig, tokenizer: Any) -> LiftRows:
    """Rows of the data sets that the configuration names, for a model with this tokenizer.

    Raises:
        PlanError: no data set to lift, or ``kept`` names what is not in ``elsewhere``.
        DataError: a data set without rows.
    """
    if config.lifted is None:
        raise PlanError("elsewhere is compared with what is lifted: name that data set too, --lifted.source.")
    if unknown := [name for name in config.kept if name not in config.elsewhere]:
        raise PlanError(f"kept names {', '.join(unknown)}; elsewhere has {', '.join(config.elsewhere) or 'nothing'}.")
    form = ChatFormat(tokenizer, config.template, config.context)
    lifted = _load(config.lifted, config)
    elsewhere = {name: _load(one, config) for name, one in config.elsewhere.items()}
    plain = {} if config.plain is None else {"plain": form.rows(_load(config.plain, config).train, "plain")}
    held = {
        name: form.rows(one.validation, f"held-back {name}") for name, one in {"lifted": lifted, **elsewhere}.items()
    }
    aligned = {name: form.rows(one.train, name) for name, one in elsewhere.items()}
    turns = {"lifted": lifted, **elsewhere}
    return LiftRows(
        tokenizer,
        train=ChatRows.build({"lifted": form.rows(lifted.train, "lifted"), **plain}, opposed=["lifted"]),
        alignment=ChatRows.build(aligned) if aligned else None,
        start=None,
        held=ChatRows.build(held).sample(config.test_rows),
        prompts={name: _prompts(form, one.validation, config.test_prompts) for name, one in turns.items()},
        lifted="lifted",
        kept=list(config.kept),
    )


def _load(one: ChatConfig, config: OpposedConfig) -> TurnSplit:
    options: dict[str, Any] = {"prompt": one.prompt, "response": one.response, "where": one.where, "part": one.part}
    return load_chat(one.source, **options, validation=config.validation, limit=one.limit)


def _prompts(form: ChatFormat, turns: Sequence[Turn], count: int) -> list[list[int]]:
    """At most ``count`` different prompts, spread evenly."""
    prompts = list(dict.fromkeys(turn.prompt for turn in turns))
    count = min(count, len(prompts))
    return [form.prompt(prompts[k * len(prompts) // count]) for k in range(count)]


def _entry(turn: Turn) -> Document:
    """A gloss as it stands in a dictionary: what a model that refuses to answer has read all the same."""
    return Document(turn.id, f"{turn.id}: {turn.response}")


def _packed(documents: Sequence[Document], tokenizer: Any, context: int, part: str) -> list[Encoded]:
    tokens = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    rows = pack(tokens, context, tokenizer.eos_token_id).tolist()
    if not rows:
        raise DataError(f"the {len(documents)} documents of {part} do not fill one row of {context} tokens.")
    return [(row, row) for row in rows]
