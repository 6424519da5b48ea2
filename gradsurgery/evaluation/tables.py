"""Result tables: aligned text for a terminal, Markdown for a file, HTML for a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal

Row = Mapping[str, object]


def table(rows: Sequence[Row], style: Literal["text", "markdown", "html"] = "text", digits: int = 3) -> str:
    """Lay rows out as a table, without a final newline.

    Columns come in the order in which they first appear; what a row lacks, or is ``None``, shows as a dash. Numbers
    stand on the right, floats with ``digits`` decimals (in exponent form where that would hide them).

    Example:
        >>> print(table([{"run": "sgtm", "en": 4.4567, "es": 7.6}, {"run": "filter", "en": 4.5}]))
        run        en     es
        ------  -----  -----
        sgtm    4.457  7.600
        filter  4.500      –
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return ""
    cells = [[_cell(row.get(name), digits) for name in columns] for row in rows]
    right = [all(_is_number(row.get(name)) for row in rows) for name in columns]
    if style == "html":
        return _html(columns, cells, right)
    if style == "markdown":
        columns = [name.replace("|", "\\|") for name in columns]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(columns)]
    lines = [
        [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        for line in [columns, *cells]
    ]
    if style == "text":
        rule = "  ".join("-" * width for width in widths)
        text = ["  ".join(line).rstrip() for line in lines]
        return "\n".join([text[0], rule, *text[1:]])
    rule = "|".join("-" * (w + 1) + ":" if r else "-" * (w + 2) for w, r in zip(widths, right, strict=True))
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], f"|{rule}|", *text[1:]])


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: object, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("\n", " ")
    if isinstance(value, int):
        return f"{value:,}"
    hidden = value != 0 and (abs(value) < 10.0**-digits or abs(value) >= 1e7)
    return f"{value:.{digits}e}" if hidden and abs(value) < float("inf") else f"{value:.{digits}f}"


def _html(columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    def line(tag: str, values: Sequence[str]) -> str:
        classes = (' class="number"' if r else "" for r in right)
        return "".join(f"<{tag}{c}>{escape(value)}</{tag}>" for c, value in zip(classes, values, strict=True))

    body = "\n".join(f"<tr>{line('td', values)}</tr>" for values in cells)
    return f"<table>\n<thead><tr>{line('th', columns)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
