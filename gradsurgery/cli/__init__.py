"""The command line: ``gradsurgery inspect``, ``gradsurgery key``, ``gradsurgery version``."""

from gradsurgery.cli.command import main

__all__ = ["main"]
