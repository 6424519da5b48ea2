"""The command line: ``gradsurgery inspect``, ``gradsurgery version``."""

from gradsurgery.cli.command import main

__all__ = ["main"]
