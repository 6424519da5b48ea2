"""The arguments of ``gradsurgery key``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradsurgery.cli.key.apply import apply
from gradsurgery.cli.key.new import new
from gradsurgery.cli.key.show import compare, show, validate
from gradsurgery.cli.models import add_model


def add_key(commands: Any) -> None:
    """``key`` and what can be done with one."""
    key = commands.add_parser(
        "key",
        help="make, show, check, apply and compare permutation keys",
        description="Permutation keys: the secret that turns the public tier C1 of a model into the keyed tier C2.",
    )
    actions = key.add_subparsers(dest="action", required=True, metavar="action")
    add_new(_action(actions, "new", new, "draw a key", NEW))
    command = _action(actions, "show", show, "print what a key is, without its swaps", SHOW)
    _add_key_file(command)
    add_model(command, nargs="?", more="; adds entries, shares, entropy and warnings")
    command.add_argument("--reveal", action="store_true", help="print the swaps: the secret itself")
    command = _action(actions, "validate", validate, "exit with 0 if a key fits a model, else with 2", VALIDATE)
    _add_key_file(command)
    add_model(command)
    command = _action(actions, "apply", apply, "write a checkpoint with the key applied: C2 as a plain model", APPLY)
    _add_key_file(command)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder written by save_pretrained")
    command.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not exist")
    command.add_argument("--auto-class", help="e.g. AutoModelForSeq2SeqLM; default: what the config says")
    command = _action(actions, "compare", compare, "print what two keys have in common", COMPARE)
    command.add_argument("a", type=Path, metavar="A.json")
    command.add_argument("b", type=Path, metavar="B.json")
    add_model(command, nargs="?", more="; adds the entries that both move")


def add_new(command: argparse.ArgumentParser) -> None:
    add_model(command, nargs="?", more="; or give dimensions instead")
    command.add_argument("--output", type=Path, required=True, metavar="key.json", help="file to write; never replaced")
    size = command.add_argument_group("size")
    size.add_argument("--fraction", type=float, default=0.2, help="share of the entries that move (default 0.2)")
    size.add_argument("--of", choices=("swappable", "all"), default="swappable", help="what it is a share of")
    size.add_argument("--attention-ratio", type=float, default=0.25, help="share of it in heads (default 0.25)")
    size.add_argument("--expert-ratio", type=float, default=0.0, help="share of it in whole experts (default 0)")
    size.add_argument("--count", type=int, default=1, metavar="N", help="N disjoint keys: key-1.json, key-2.json, …")
    kind = command.add_argument_group("kind")
    kind.add_argument("--pairing", choices=("cross_layer", "any"), default="cross_layer", help="layers that swaps join")
    kind.add_argument("--attention", choices=("full", "output"), default="full", help="what of a head moves")
    kind.add_argument("--mlp", choices=("full", "up", "down"), default="full", help="what of a neuron moves")
    source = command.add_argument_group("randomness", "by default the operating system's; the file is then the secret")
    exclusive = source.add_mutually_exclusive_group()
    exclusive.add_argument("--seed", type=int, help="repeatable, and guessable: for experiments")
    exclusive.add_argument("--passphrase", action="store_true", help="derive the key from a passphrase; asks for it")
    exclusive.add_argument(
        "--passphrase-file", metavar="FILE", help="the same, read from a file, or from stdin (-); one line"
    )
    plain = command.add_argument_group("dimensions", "instead of MODEL: a plain transformer")
    for name, text in (
        ("--layers", "layers"),
        ("--heads", "attention heads a layer"),
        ("--hidden", "width of the residual stream"),
        ("--mlp-dim", "neurons a layer"),
        ("--kv-heads", "key and value heads a layer, where heads share them"),
        ("--head-dim", "width of a head, if not hidden / heads"),
        ("--parameters", "entries of the whole model, for --of all"),
    ):
        plain.add_argument(name, type=int, metavar="N", help=text)
    plain.add_argument("--gated", action="store_true", help="the MLP has a gate projection")
    plain.add_argument("--no-mlp-bias", action="store_true", help="up (and gate) have no bias")
    plain.add_argument("--attention-bias", action="store_true", help="q, k and v have biases")


def _action(actions: Any, name: str, run: Any, text: str, examples: str) -> argparse.ArgumentParser:
    command = actions.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command  # type: ignore[no-any-return]


def _add_key_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("key", type=Path, metavar="KEY.json", help="key file")


NEW = """examples:
  gradsurgery key new ./my-model --output key.json
  gradsurgery key new ./my-model --output keys/key.json --count 3 --fraction 0.05 --of all
  gradsurgery key new llama --output key.json --passphrase
  pass show my-key | gradsurgery key new ./my-model --output key.json --passphrase-file -
  gradsurgery key new --layers 12 --heads 32 --hidden 512 --mlp-dim 2048 --output key.json"""
SHOW = """examples:
  gradsurgery key show key.json
  gradsurgery key show key.json ./my-model"""
VALIDATE = """example:
  gradsurgery key validate key.json ./my-model && sbatch finetune.sh"""
APPLY = """The output is C2 and as secret as the key: whoever compares it with the public checkpoint has the key.
Its folder is readable by its owner only, and gradsurgery.json in it says what it is. Applied again, the key
gives C1 back.

examples:
  gradsurgery key apply key.json ./my-model ./my-model-c2
  gradsurgery key apply key.json ./my-model-c2 ./my-model-again"""
COMPARE = """example:
  gradsurgery key compare key-1.json key-2.json ./my-model"""
