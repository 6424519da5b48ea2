"""``gradsurgery key show``, ``validate`` and ``compare``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gradsurgery.cli.key.describe import describe, warn_of_differences
from gradsurgery.cli.models import anatomy_of
from gradsurgery.errors import SelectionError
from gradsurgery.evaluation.tables import table
from gradsurgery.keys import PermutationKey
from gradsurgery.keys.lists import LISTS, canonical, check_slots, slots_of


def load(path: Path) -> PermutationKey:
    """A key that is one by itself, whatever the model.

    Raises:
        ArtefactError, SelectionError: what is wrong with the file.
    """
    key = PermutationKey.load(path)
    if not key.lists:
        raise SelectionError(f"{path} holds no swap, so applying it would do nothing.")
    _ = key.fingerprint  # checks the types
    check_slots(key.lists)
    return key


def show(options: argparse.Namespace) -> None:
    """Print what a key is; see ``gradsurgery key show --help``."""
    key = load(options.key)
    print(f"{options.key}: key {key.fingerprint}, {_mark(key)}")
    if options.model is None:
        print(describe(key))
    else:
        anatomy, model = anatomy_of(options.model, options.auto_class)
        key.validate(anatomy)
        print(describe(key, anatomy))
        warn_of_differences(key, anatomy, model)
    if options.reveal:
        for name, swaps in key.lists.items():
            print(f"{name}: {json.dumps(canonical(swaps))}")


def validate(options: argparse.Namespace) -> None:
    """Raise unless a key fits a model; see ``gradsurgery key validate --help``."""
    key = load(options.key)
    anatomy, model = anatomy_of(options.model, options.auto_class)
    key.validate(anatomy)
    warn_of_differences(key, anatomy, model)
    print(f"{options.key}: key {key.fingerprint} fits {anatomy.space.model} ({anatomy.fingerprint})")


def compare(options: argparse.Namespace) -> None:
    """Print what two keys have in common; see ``gradsurgery key compare --help``."""
    a, b = (load(path) for path in (options.a, options.b))
    for name, path, key in (("a", options.a, a), ("b", options.b, b)):
        print(f"{name} is {path}: key {key.fingerprint}, {_mark(key)}")
    rows = []
    for kind in dict.fromkeys(LISTS[name].kind for key in (a, b) for name in key.lists):
        slots = [{slot for k, slot, _ in slots_of(key.lists) if k == kind} for key in (a, b)]
        swaps = [
            {(n, swap) for n, found in key.lists.items() if LISTS[n].kind == kind for swap in canonical(found)}
            for key in (a, b)
        ]
        both: dict[str, list[set[Any]]] = {"slots": [*slots], "swaps": [*swaps]}
        row: dict[str, object] = {"kind": kind}
        for name, (one, other) in both.items():
            row |= {f"{name} of a": len(one), f"{name} of b": len(other), f"{name} of both": len(one & other)}
        rows.append(row)
    print(table(rows))
    disjoint = not set(slots_of(a.lists)) & set(slots_of(b.lists))
    said = "equal" if a == b else "disjoint, so that both may be applied" if disjoint else "not disjoint"
    print(f"the keys are {said}")
    if options.model is not None:
        anatomy = anatomy_of(options.model, options.auto_class)[0]
        regions = {"a": a.region(anatomy), "b": b.region(anatomy)}
        shared = (regions["a"] & regions["b"]).numel()
        shares = " and ".join(f"{100 * shared / region.numel():.2f}% of {name}'s" for name, region in regions.items())
        print(f"both move {shared:,} of {anatomy.space.numel():,} entries: {shares}")


def _mark(key: PermutationKey) -> str:
    return "for any model that has its slots" if key.model is None else f"made for the model {key.model}"
