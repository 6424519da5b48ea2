"""One self-contained ``report.html``: configuration, results, figures; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gradsurgery.evaluation.tables import Row, table
from gradsurgery.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #111; } .number { text-align: right; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #444; }
.wide { overflow-x: auto; }
"""


def write_report(
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, object],
    results: Sequence[Row] | Mapping[str, Sequence[Row]],
    figures: Mapping[str, Figure] | None = None,
    notes: Sequence[str] = (),
    digits: int = 3,
) -> Path:
    """Write the report, whole or not at all, and return its path.

    Args:
        path: Where to; folders are made.
        title: Heading.
        config: What the run was given; nested mappings appear with dotted names.
        results: Rows of one table, or heading -> rows of several.
        figures: Caption -> figure, put in as PNG.
        notes: Paragraphs below the title, plain text: what was measured, what to read off.
        digits: Decimals of the floats in the result tables.
    """
    tables = results if isinstance(results, Mapping) else {"Results": results}
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(note)}</p>" for note in notes)]
    for heading, rows in tables.items():
        parts += [f"<h2>{escape(heading)}</h2>", f'<div class="wide">{table(rows, "html", digits)}</div>']
    if figures:
        parts.append("<h2>Figures</h2>")
    for caption, figure in (figures or {}).items():
        name = escape(caption)
        parts.append(f'<figure><img alt="{name}" src="{_data_uri(figure)}"><figcaption>{name}</figcaption></figure>')
    settings = [{"setting": name, "value": value} for name, value in _flat(config)]
    parts += ["<h2>Configuration</h2>", table(settings, "html")]
    text = (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )
    path = Path(path)
    write_text(path, text)
    return path


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _flat(config: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", str(value)))
    return lines
