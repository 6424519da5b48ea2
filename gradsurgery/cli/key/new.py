"""``gradsurgery key new``: draw keys and write them."""

from __future__ import annotations

import argparse
import getpass
import sys
import warnings
from pathlib import Path

from gradsurgery.cli.key.describe import describe, warn_of_differences
from gradsurgery.cli.key.dimensions import anatomy_of_dimensions, dimensions_of
from gradsurgery.cli.models import anatomy_of
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.keys import PermutationKey
from gradsurgery.keys.store import warn_of_readers


def new(options: argparse.Namespace) -> None:
    """Draw one key or several, print what may be known of them; see ``gradsurgery key new --help``."""
    dimensions = dimensions_of(options)
    paths = outputs(options.output.expanduser(), options.count)
    passphrase = secret(options.passphrase, options.passphrase_file)
    if dimensions is None:
        anatomy, model = anatomy_of(options.model, options.auto_class)
    else:
        anatomy, model = anatomy_of_dimensions(dimensions), None
    drawn = PermutationKey.generate(
        dimensions or anatomy,
        fraction=options.fraction,
        attention_ratio=options.attention_ratio,
        expert_ratio=options.expert_ratio,
        of=options.of,
        pairing=options.pairing,
        count=options.count,
        seed=options.seed,
        passphrase=passphrase,
        attention=options.attention,
        mlp=options.mlp,
    )
    for key, path in zip(drawn if options.count > 1 else [drawn], paths, strict=True):
        if model is not None:
            warn_of_differences(key, anatomy, model)
        key.save(path)
        print(f"{path}: key {key.fingerprint} for {made_for(key, anatomy)}")
        print(describe(key, anatomy, whole_model=dimensions is None or dimensions.total is not None))
        if options.attention_ratio > 0 and not (key.attn_heads or key.attn_out_heads):
            print("no swap of heads fits into --attention-ratio of --fraction; neurons got its share")
    if options.seed is not None:
        print("Drawn from a seed: whoever guesses the seed has the key, whatever the entropy above. For experiments.")
    if passphrase is not None:
        print("Derived from a passphrase: the entropy is at most the passphrase's.")


def made_for(key: PermutationKey, anatomy: object) -> str:
    space = getattr(anatomy, "space", None)
    return f"{space.model} ({key.model})" if key.model is not None and space else "any model of these dimensions"


def outputs(path: Path, count: int) -> list[Path]:
    """``key.json``, or ``key-1.json``, ``key-2.json``, …

    Raises:
        ArtefactError: one of them exists.
    """
    if count < 1:
        raise PlanError(f"--count {count} is no number of keys; give 1 or more.")
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{k + 1}{path.suffix}") for k in range(count)]
    for one in paths:
        if one.exists():
            raise ArtefactError(f"{one} exists, and a key that is replaced is lost for good. Name another --output.")
    return paths


def secret(ask: bool, file: str | None) -> str | None:
    """The passphrase, from the terminal or a file; never from the arguments, which other users can list.

    Raises:
        PlanError: no terminal, two different entries, or an empty passphrase.
    """
    if ask:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)
            try:
                first, again = getpass.getpass("Passphrase: "), getpass.getpass("Again: ")
            except (getpass.GetPassWarning, EOFError):
                raise PlanError(
                    "no terminal to ask for the passphrase on; give --passphrase-file FILE, or -."
                ) from None
        if first != again:
            raise PlanError("the two passphrases differ.")
    elif file == "-":
        first = sys.stdin.readline().rstrip("\r\n")
    elif file is not None:
        path = Path(file).expanduser()
        text = path.read_text(encoding="utf-8")
        if text.rstrip("\r\n").count("\n"):
            raise PlanError(f"{path} has several lines; a passphrase is one.")
        warn_of_readers(path)
        first = text.rstrip("\r\n")
    else:
        return None
    if not first:
        raise PlanError("the passphrase is empty.")
    return first
