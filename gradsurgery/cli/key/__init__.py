"""``gradsurgery key``: make, show, check, apply and compare permutation keys."""

from gradsurgery.cli.key.arguments import add_key

__all__ = ["add_key"]
