"""How a recipe ends: one sentence where it cannot go on, and no thread left behind where it ran on several ranks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed as dist

from gradsurgery.errors import GradsurgeryError


@contextmanager
def ending_in_a_sentence(interrupted: str = "run the same command again to resume.") -> Iterator[None]:
    """Inside the block errors of the library, and an interruption, end the program with status 1 and a sentence.

    The process group, if there is one, ends with the block (:func:`leave_group`).

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
    finally:
        leave_group()


def leave_group() -> None:
    """Ends the default process group and its threads; without one, nothing.

    A gloo thread that frees a collective's tensors while the interpreter shuts down aborts the process, after all work
    was done: torchrun then reports a failed run. The threads end with the group's last owner, and a wrapped model that
    is part of a reference cycle (a Trainer's) is an owner until it is collected. Call it where none is in use any more.

    Example:
        >>> from gradsurgery.runs import leave_group
        >>> leave_group()
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
