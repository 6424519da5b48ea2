"""``gradsurgery inspect``: the anatomy of a model, from its config alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradsurgery.anatomy.anatomy import Anatomy
from gradsurgery.anatomy.entries import Entries, all_bits, indices_of, span_of
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.units import Units
from gradsurgery.cli.models import add_model, anatomy_of


def add_inspect(commands: Any) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "inspect",
        help="print the anatomy of a model: its heads, KV groups, neurons and experts",
        description="Print the anatomy of a model or config. Weights are not loaded.",
    )
    add_model(command)
    command.add_argument("--save", type=Path, metavar="anatomy.json", help="write the anatomy as JSON")
    command.add_argument("--select", metavar="TEXT", help='a selection, e.g. "heads[:, -1:] | neurons[:, -64:]"')
    command.add_argument("--groups", action="store_true", help="list the unit groups")
    command.set_defaults(run=inspect)


def inspect(options: argparse.Namespace) -> None:
    """Print the anatomy of a model; see ``gradsurgery inspect --help``."""
    anatomy = anatomy_of(options.model, options.auto_class)[0]
    print(anatomy)
    if options.groups:
        print_groups(anatomy)
    if options.select is not None:
        print_region(anatomy.select(options.select))
    if options.save is not None:
        anatomy.save(options.save)
        print(f"saved {options.save}")


def print_groups(anatomy: Anatomy) -> None:
    print(f"\n{len(anatomy.groups)} groups")
    width = max((len(group.name) for group in anatomy.groups), default=0)
    for group in anatomy.groups:
        classes = len(set(group.exchange_classes))
        notes = [] if classes < len(group) or len(group) == 1 else ["not exchangeable"]
        notes += ["several exchange classes"] if 1 < classes < len(group) else []
        notes += [] if group.closed else ["not closed"]
        print(f"{group.layer:4d}  {group.kind:9s}{group.name:{width}s}{len(group):7,d}  {', '.join(notes)}".rstrip())


def print_region(region: Region) -> None:
    count = f"{region.count:,} units, " if isinstance(region, Units) else ""
    print(
        f"\n{region.text or 'selection'}: {count}{region.numel():,} entries, {100 * region.fraction:.3f}% of the model"
    )
    width = max((len(name) for name in region.entries), default=0)
    for name, entries in region.entries.items():
        parts = [_show(entries, box) for box in entries.boxes()]
        shown = " ".join(parts[:3]) + (f" … {len(parts)} parts" if len(parts) > 3 else "")
        print(f"  {name:{width}s}  {entries.numel():>12,d}  {shown}")


def _show(entries: Entries, box: tuple[int, ...]) -> str:
    return "[" + ", ".join(_show_bits(bits, n) for bits, n in zip(box, entries.shape, strict=True)) + "]"


def _show_bits(bits: int, size: int) -> str:
    """Indices as Python slices: ``:``, ``3:7``, or runs ``{0:2, 5:6, …}``."""
    if bits == all_bits(size):
        return ":"
    if (span := span_of(bits)) is not None:
        return f"{span[0]}:{span[1]}"
    runs: list[list[int]] = []
    for index in indices_of(bits).tolist():
        if runs and runs[-1][1] == index:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    shown = ", ".join(f"{start}:{stop}" for start, stop in runs[:4])
    return "{" + shown + (f", … {len(runs)} runs" if len(runs) > 4 else "") + "}"
