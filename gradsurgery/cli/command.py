"""``gradsurgery``: arguments, and errors as one line on stderr with exit status 2."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gradsurgery.cli.inspect import add_inspect
from gradsurgery.cli.key import add_key
from gradsurgery.errors import GradsurgeryError, KeyWarning
from gradsurgery.version import __version__


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="gradsurgery", description="Gradient surgery on parts of any Hugging Face model."
    )
    commands = out.add_subparsers(dest="command", required=True, metavar="command")
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=lambda options: print(__version__))
    add_inspect(commands)
    add_key(commands)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (argparse itself exits with 2 on wrong arguments)."""
    options = parser().parse_args(arguments)
    try:
        with warnings_as_lines():
            options.run(options)
    except BrokenPipeError:  # `gradsurgery inspect … | head`
        sys.stderr.close()
        return 0
    except (GradsurgeryError, OSError) as error:
        say(str(error))
        return 2
    return 0


def say(text: str) -> None:
    print(f"gradsurgery: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """What keys warn of becomes a line on stderr; the warnings of others are not this program's."""

    def show(message: Any, *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", KeyWarning)
        warnings.showwarning = show
        yield
