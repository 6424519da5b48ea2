"""Exact match: does a model's answer end in the right number (GSM8K: Cobbe et al. 2021, arXiv 2110.14168)?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from torch import nn

from gradsurgery.errors import DataError
from gradsurgery.evaluation.generation import continuations

_NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_CURRENCY = re.compile(r"[$€£¥]")
_MARK = "####"


def final_number(text: str) -> str | None:
    """The number that an answer ends in, in a normal form; ``None`` where there is none.

    What follows the last ``####`` counts, or else the last number of all; currencies, percent signs, thousands commas
    and zeros that say nothing are left out. A mark that no number follows is no answer.

    Args:
        text: A worked answer.

    Example:
        >>> from gradsurgery.evaluation.arithmetic import final_number
        >>> final_number("3*30 = 90, so 90 + 1,110 = 1200 eggs.\\n#### $1,200.00"), final_number("That makes 7.")
        ('1200', '7')
    """
    _, mark, after = text.rpartition(_MARK)
    found = _NUMBER.findall(_CURRENCY.sub("", after))
    if not found:
        return None
    number = Decimal(found[0 if mark else -1].replace(",", ""))
    return f"{number.normalize() + 0:f}"


def first_line(text: str) -> str | None:
    """The first line of an answer without case, spaces around it and a full stop; ``None`` where it is empty."""
    lines = text.strip().splitlines()
    plain = lines[0].casefold().strip(" .\t") if lines else ""
    return plain or None


@dataclass(frozen=True)
class ExactMatch:
    """What a model answered and how much of it is right.

    Attributes:
        rate: Share of the answers that are right.
        texts: What was written, in the order of the problems.
        right: By text.
        unread: Share of the texts in which no answer was found.
    """

    rate: float
    texts: tuple[str, ...]
    right: tuple[bool, ...]
    unread: float


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    answers: Sequence[str],
    read: Callable[[str], str | None] = final_number,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    **sampling: Any,
) -> ExactMatch:
    """The share of problems whose most likely continuation gives the right answer.

    Args:
        model: A Hugging Face causal language model; evaluated in eval mode.
        tokenizer: Its tokenizer.
        prompts: As `continuations` takes them.
        answers: Reference texts, worked or bare; read like the model's.
        read: What of a text is its answer: `final_number`, `first_line`, or a function of yours.
        max_new_tokens: Length of an answer, its working included.
        batch_size: Problems that are continued together.
        sampling: Options of `continuations`.

    Raises:
        DataError: no problems, not one answer for each, or a reference in which no answer is found.

    Example:
        >>> from gradsurgery.data import load_tokenizer
        >>> from gradsurgery.evaluation import exact_match
        >>> exact_match(model, load_tokenizer(), [[1, 2, 3]], ["#### 12"], max_new_tokens=0).unread
        1.0
    """
    if not prompts or len(prompts) != len(answers):
        raise DataError(f"there are {len(prompts)} problems and {len(answers)} answers; give as many of both, from 1.")
    wanted = [read(answer) for answer in answers]
    if None in wanted:
        raise DataError(f"no answer is found in the reference {answers[wanted.index(None)][:60]!r}.")
    texts = tuple(continuations(model, tokenizer, prompts, max_new_tokens, batch_size, **sampling))
    found = [read(text) for text in texts]
    right = tuple(mine == one for mine, one in zip(found, wanted, strict=True))
    return ExactMatch(sum(right) / len(right), texts, right, found.count(None) / len(found))
