"""``gradsurgery``: arguments, and errors as one line on stderr with exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gradsurgery.cli.inspect import inspect
from gradsurgery.errors import GradsurgeryError
from gradsurgery.version import __version__


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="gradsurgery", description="Gradient surgery on parts of any Hugging Face model."
    )
    commands = out.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("version", help="print the version")
    command = commands.add_parser(
        "inspect",
        help="print the anatomy of a model: its heads, KV groups, neurons and experts",
        description="Print the anatomy of a model or config. Weights are not loaded.",
    )
    command.add_argument(
        "model",
        help="folder with a config.json, a config.json, a hub name, or a model type such as llama (its default config)",
    )
    command.add_argument(
        "--auto-class", help="e.g. AutoModelForMaskedLM; default: what the config says, or a causal LM"
    )
    command.add_argument("--save", type=Path, metavar="anatomy.json", help="write the anatomy as JSON")
    command.add_argument("--select", metavar="TEXT", help='a selection, e.g. "heads[:, -1:] | neurons[:, -64:]"')
    command.add_argument("--groups", action="store_true", help="list the unit groups")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (argparse itself exits with 2 on wrong arguments)."""
    options = parser().parse_args(arguments)
    if options.command == "version":
        print(__version__)
        return 0
    try:
        inspect(options.model, options.auto_class, options.save, options.select, options.groups)
    except BrokenPipeError:  # `gradsurgery inspect … | head`
        sys.stderr.close()
        return 0
    except (GradsurgeryError, OSError) as error:
        print(f"gradsurgery: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
