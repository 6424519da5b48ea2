"""``data.json`` and ``data.html``: what the corpus of a run holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsurgery import evaluation
from gradsurgery.data import Exploration, explore_corpus
from gradsurgery.data.split import Split
from gradsurgery.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def exploration(
    corpus: Mapping[str, Split], tokens: Mapping[str, Mapping[str, Sequence[Sequence[int]]]]
) -> Callable[[], Exploration]:
    """What explores a corpus when it is called; of the tokens (side -> category -> documents) it keeps the lengths."""
    lengths = {side: {name: list(map(len, of)) for name, of in by.items()} for side, by in tokens.items()}
    return lambda: explore_corpus(corpus, lengths)


def write_exploration(folder: str | Path, found: Exploration, title: str, config: Mapping[str, Any]) -> Path:
    """Write both files into a folder; returns the path of the page.

    Args:
        found: See `gradsurgery.data.Explorer`.
        config: What the corpus was read with.
    """
    folder = Path(folder)
    write_json(folder / "data.json", found.plain())
    tables: dict[str, Any] = {"Documents and tokens": found.sizes}
    if found.words:
        tables["Most distinctive words (log-odds with a prior, z-scores; Monroe et al. 2008)"] = [
            {"category": category, "words": ", ".join(f"{word} {z:.0f}" for word, z in words)}
            for category, words in found.words.items()
        ]
    if found.overlap:
        tables["Shared vocabulary"] = found.overlap
    if found.repeats:
        tables["Held-back documents whose text is trained on"] = found.repeats
    notes = []
    if found.repeats is None:
        notes.append("Repeats between the splits were not looked for here.")
    elif not found.repeats:
        notes.append("No held-back text is trained on.")
    if found.approximate:
        notes.append("Words were counted without the rarest: there are too many to keep.")
    figures = {"Lengths of the documents, in bins that double": length_plot(found)}
    return evaluation.write_report(
        folder / "data.html", title=title, config=config, results=tables, figures=figures, notes=notes
    )


def length_plot(found: Exploration) -> Figure:
    """Share of each category's documents by length."""
    at = sorted({length for of in found.lengths.values() for length, _ in of})
    shares = {}
    for category, of in found.lengths.items():
        documents = dict(of)
        shares[category] = [documents.get(length, 0) / sum(documents.values()) for length in at]
    figure = evaluation.density_plot({"documents": shares}, [math.log2(max(n, 1)) for n in at], "log2 of the tokens")
    figure.axes[0].set_ylabel("share of the category's documents")
    return figure
