"""The matrix of equality as a table in ``docs/engines.md``: ``python -m tests.engines.page [column …]`` measures and
writes it, or some of its columns."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.engines.equality import LOCAL, RANKS, Cell, cell, on_ranks
from tests.engines.methods import CASES
from tests.integrations.hosts import HOSTS, equal

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
COLUMNS = (*LOCAL, *RANKS, *HOSTS)
START, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"


def measure(columns: Sequence[str] = COLUMNS) -> dict[str, dict[str, Cell]]:
    """Cells by method and column."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory() as directory:
        if on_two := tuple(column for column in columns if column in RANKS):
            found = on_ranks(Path(directory), list(CASES), on_two)
        for column in columns:
            if column in HOSTS:
                found[column] = {name: equal(column, name, Path(directory)) for name in CASES}
            elif column in LOCAL:
                found[column] = {name: cell(column, name) for name in CASES}
    return {name: {column: found[column][name] for column in columns} for name in CASES}


def table_of(found: dict[str, dict[str, Cell]]) -> str:
    columns = list(next(iter(found.values())))
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, cells in found.items():
        shown = [f"{value:.0e}" if isinstance(value, float) else f"refused: {value}" for value in cells.values()]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def read() -> dict[str, dict[str, Cell]]:
    """The page's table."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index(START) + len(START) : text.index(END)].strip().splitlines()
    columns, rows = [part.strip() for part in re.split(r"(?<!\\)\|", "".join(lines[:1]))[2:-1]], lines[2:]
    out: dict[str, dict[str, Cell]] = {}
    for row in rows:
        name, *cells = (part.strip() for part in re.split(r"(?<!\\)\|", row)[1:-1])
        out[name] = {
            column: shown.removeprefix("refused: ") if shown.startswith("refused") else float(shown)
            for column, shown in zip(columns, cells, strict=True)
        }
    return out


def write(found: dict[str, dict[str, Cell]]) -> None:
    """Put cells into the page; those that were not measured stay."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    held = read()
    cells = {name: {**held.get(name, {}), **found[name]} for name in found}
    ordered = {name: {column: cells[name][column] for column in COLUMNS if column in cells[name]} for name in cells}
    PAGE.write_text(before + table_of(ordered) + after, encoding="utf-8")


if __name__ == "__main__":
    write(measure(sys.argv[1:] or COLUMNS))
