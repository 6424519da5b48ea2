"""Conversations of one turn: data sets with a prompt and a response column, templates, labels on the response alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsurgery.data.corpus import source_rows
from gradsurgery.data.split import held_back
from gradsurgery.errors import DataError

IGNORED = -100
QUESTION = "Question: {prompt}\nAnswer:"
Encoded = tuple[list[int], list[int]]
"""Token ids of a row, and its labels: ``-100`` where nothing is to be learned."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and its response; ``id`` decides between train and validation."""

    id: str
    prompt: str
    response: str


@dataclass(frozen=True)
class TurnSplit:
    """One category's turns."""

    train: list[Turn]
    validation: list[Turn]


def split_turns(turns: Iterable[Turn], validation: float) -> TurnSplit:
    """Deal turns by a hash of their id; turns of one id are always on the same side."""
    if not 0 <= validation < 1:
        raise DataError(f"validation={validation} is no share: give a number from 0 to below 1.")
    parts: tuple[list[Turn], list[Turn]] = ([], [])
    for turn in turns:
        parts[held_back(turn.id, validation)].append(turn)
    return TurnSplit(*parts)


def load_chat(
    source: str | Path,
    *,
    prompt: str = "prompt",
    response: str = "response",
    where: Mapping[str, Any] | None = None,
    part: str | None = None,
    validation: float = 0.05,
    limit: int | None = None,
) -> TurnSplit:
    """A data set of prompts and responses, such as ``hub:PKU-Alignment/BeaverTails`` with ``where={"is_safe": False}``.

    Args:
        source: ``"hub:owner/name"``, or a local file or folder as `load_bilingual` takes it.
        prompt, response: Columns.
        where: Column -> value; rows with other values are left out.
        part: The data set's own part (``"30k_train"``), where it has several; by default all of them.
        validation: Share of the prompts held back: the responses to one prompt are all on the same side.
        limit: Keep the first ``limit`` rows of those.

    Raises:
        DataError: nothing there, no such column, or no row left.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "chat.jsonl"
        >>> _ = path.write_text(json.dumps({"prompt": "Hello?", "response": "Hello.", "is_safe": True}))
        >>> len(gs.data.load_chat(path, where={"is_safe": True}).train)
        1
    """
    seen: dict[str, set[str]] = {}
    turns: list[Turn] = []
    for row in (row for rows in source_rows(source, part=part).values() for row in rows):
        for column in (prompt, response, *(where or {})):
            if column not in row:
                raise DataError(f"{source}, row {row.get('id')}: no column {column!r}; it has {', '.join(row)}.")
        for column in where or {}:
            seen.setdefault(column, set()).add(repr(row[column]))
        if all(row[column] == value for column, value in (where or {}).items()):
            question, answer = (str(row[name] or "").strip() for name in (prompt, response))
            if question and answer:
                turns.append(Turn(question.lower(), question, answer))
        if len(turns) == limit:
            break
    if not turns:
        values = "; ".join(f"{column} is {' or '.join(sorted(v)[:5])}" for column, v in seen.items())
        raise DataError(
            f"{source} has no row with a {prompt} and a {response}" + (f" where {where}: {values}." if values else ".")
        )
    return split_turns(turns, validation)


@dataclass(frozen=True)
class ChatFormat:
    """How turns become tokens: prompt and response meet at a token boundary, and no text begins twice.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: ``"auto"``: the tokenizer's own chat template, or else ``QUESTION``; or a text with ``{prompt}``,
            after which the response stands (with a space between them), closed by the end-of-text token.
        max_length: Tokens of a row; longer responses are cut.

    Raises:
        DataError: a template without ``{prompt}``.
    """

    tokenizer: Any
    template: str = "auto"
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.template != "auto" and "{prompt}" not in self.template:
            raise DataError(f"the template {self.template!r} has no {{prompt}}; write it where the prompt stands.")

    def prompt(self, prompt: str) -> list[int]:
        """Tokens up to where the response begins."""
        return self._encode(self._texts(prompt, "")[0], begins=True)

    def row(self, turn: Turn) -> Encoded | None:
        """Tokens and labels of prompt and response; ``None`` where the prompt leaves no room for a response."""
        before, after = self._texts(turn.prompt, turn.response)
        ids = self._encode(before, begins=True)
        response = self._encode(after, begins=False)
        if not self._own_template and self.tokenizer.eos_token_id is not None:
            response.append(self.tokenizer.eos_token_id)
        labels = [IGNORED] * len(ids) + response
        if len(ids) >= self.max_length or not response:
            return None
        return (ids + response)[: self.max_length], labels[: self.max_length]

    def rows(self, turns: Sequence[Turn], what: str = "this data") -> list[Encoded]:
        """Rows of turns, without those whose prompt leaves no room.

        Raises:
            DataError: none is left.
        """
        found = [row for row in map(self.row, turns) if row is not None]
        if not found:
            raise DataError(
                f"no row of {what} has anything to learn: {len(turns)} turns, and at most {self.max_length} tokens; "
                f"give more of them, or a larger max_length."
            )
        return found

    @property
    def _own_template(self) -> bool:
        return self.template == "auto" and bool(getattr(self.tokenizer, "chat_template", None))

    def _texts(self, prompt: str, response: str) -> tuple[str, str]:
        if not self._own_template:
            before = (QUESTION if self.template == "auto" else self.template).replace("{prompt}", prompt)
            return before, response if before[-1:].isspace() else f" {response}"
        said = [{"role": "user", "content": prompt}]
        options = {"tokenize": False}
        before = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, **options)
        whole = self.tokenizer.apply_chat_template([*said, {"role": "assistant", "content": response}], **options)
        if not whole.startswith(before):
            raise DataError(
                "the tokenizer's chat template writes a prompt differently once it is answered; give a template text."
            )
        return before, whole[len(before) :]

    def _encode(self, text: str, begins: bool) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not begins or self.tokenizer.bos_token_id is None or ids[:1] == [self.tokenizer.bos_token_id]:
            return ids  # a template writes its own first token
        adds_one = list(self.tokenizer("a")["input_ids"])[:1] == [self.tokenizer.bos_token_id]
        return [self.tokenizer.bos_token_id, *ids] if adds_one else ids


def require_same_tokens(model: Any, reference: Any) -> None:
    """Check that two tokenizers mean the same by every token, as a divergence of next tokens needs it.

    Raises:
        DataError: they differ.
    """
    mine, theirs = model.get_vocab(), reference.get_vocab()
    if mine == theirs:
        return
    token = next((t for t in sorted({*mine, *theirs}) if mine.get(t) != theirs.get(t)), "")
    raise DataError(
        f"the reference's tokenizer has {len(theirs):,} entries and the model's {len(mine):,}; they differ at "
        f"{token!r} ({theirs.get(token)} and {mine.get(token)}). A divergence compares next tokens one by one: take a "
        f"reference with the model's tokenizer."
    )
