"""How a recipe ends when it cannot go on: one sentence, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gradsurgery.errors import GradsurgeryError


@contextmanager
def ending_in_a_sentence(interrupted: str = "run the same command again to resume.") -> Iterator[None]:
    """Inside the block errors of the library, and an interruption, end the program with status 1 and a sentence.

    Args:
        interrupted: What to do after an interruption.

    Example:
        >>> from gradsurgery.runs import ending_in_a_sentence
        >>> with ending_in_a_sentence():
        ...     raise gs.errors.DataError("the file holds no text.")
        Traceback (most recent call last):
        SystemExit: DataError: the file holds no text.
    """
    try:
        yield
    except GradsurgeryError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {interrupted}")
