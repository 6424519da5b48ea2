"""The scaling page: how costs grow, measured on this machine, and computed beyond it.

python -m benchmarks --sections scaling --page docs/scaling.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import computed, growth
from gradsurgery.errors import DataError
from gradsurgery.evaluation.tables import table
from gradsurgery.files import write_text

START, END = "<!-- {} -->\n", "<!-- end of {} -->\n"
Tables = Mapping[str, list[dict[str, Any]]]


def measure(
    size: growth.Size, device: str, only: str = "", models: tuple[str, ...] = computed.MODELS
) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts ``measured`` and ``computed``, and the figures."""
    grown = growth.measure(size, device, lambda title: bool(re.search(only, title)))
    beyond = computed.compute(models)
    texts = {"measured": tables_of(grown, growth.SECTIONS), "computed": tables_of(beyond, computed.SECTIONS)}
    return texts, {"measured": grown, "computed": beyond}


def tables_of(lines: Tables, functions: Mapping[str, Any]) -> str:
    """A heading, what is measured or the formula, and a table for every section."""
    parts = [
        f"### {title}\n\n{inspect.getdoc(functions[title])}\n\n{table(found, 'markdown')}"
        for title, found in lines.items()
    ]
    return "\n\n".join(parts) + "\n"


def write(page: Path, texts: Mapping[str, str]) -> None:
    """Put texts between their markers; the rest of the page stays.

    Raises:
        DataError: the page lacks a marker.
    """
    held = page.read_text(encoding="utf-8")
    for name, text in texts.items():
        start, end = START.format(name), END.format(name)
        if start not in held or end not in held:
            raise DataError(f"{page} has no lines {start.strip()} and {end.strip()} to write between.")
        held = held[: held.index(start) + len(start)] + text + held[held.index(end) :]
    write_text(page, held)
