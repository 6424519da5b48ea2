"""Tables, bars and curves of runs with tiers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsurgery import evaluation
from gradsurgery.evaluation.tables import Row
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.tiers import Figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def score_lines(scores: Mapping[str, Figures], what: str = "tier") -> list[dict[str, Any]]:
    """A line for each tier or holder: loss and accuracy of every category."""
    return [
        {
            what: name,
            **{f"{category} {kind}": value for category, one in figures.items() for kind, value in one.items()},
        }
        for name, figures in scores.items()
    ]


def cost_line(result: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """Tokens per second, FLOPs and their utilisation of one training."""
    out: dict[str, Any] = {"model": name} if name is not None else {}
    out |= {"seconds": result["seconds"], "tokens/s": int(result["tokens_per_second"])}
    return {**out, "training FLOPs": result["flops"], "MFU": result.get("mfu")}


def score_bars(scores: Mapping[str, Figures]) -> Figure:
    """Losses of each tier or holder: a panel for each category."""
    from matplotlib.figure import Figure  # only whoever draws needs matplotlib

    categories = list(next(iter(scores.values())))
    names = list(scores)
    figure = Figure(figsize=(min(4.6 * len(categories), 18.0), 0.4 * len(names) + 1.4), dpi=110, layout="constrained")
    for axes, category in zip(figure.subplots(1, len(categories), squeeze=False)[0], categories, strict=True):
        losses = [scores[name][category]["loss"] for name in names]
        bars = axes.barh(names, losses, 0.7, color="#D9D9D9", edgecolor="black")
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.set(title=category, xlabel="held-back loss (nats per token)")
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves(folder: RunFolder) -> Figure | None:
    """Held-back losses during training: a panel for each tier and category, a line for each model."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in folder.metrics:
        for key, value in line.items():
            if key.startswith("eval/"):
                found.setdefault(line["model"], {}).setdefault(key[5:], []).append((line["step"], value))
    return evaluation.training_curves(found) if found else None


def write(
    folder: RunFolder,
    title: str,
    results: Mapping[str, Sequence[Row]],
    figures: Mapping[str, Figure],
    notes: Sequence[str],
) -> None:
    """``plots/`` and ``report.html`` of a run, with the curves of its training."""
    drawn = dict(figures)
    if (found := curves(folder)) is not None:
        drawn["Held-back loss during training (a sample)"] = found
    (folder / "plots").mkdir(exist_ok=True)
    for k, (caption, figure) in enumerate(drawn.items()):
        words = "_".join("".join(c if c.isalnum() else " " for c in caption.lower()).split()[:4])
        figure.savefig(folder / "plots" / f"{k + 1}_{words}.png")
    evaluation.write_report(
        folder / "report.html", title=title, config=folder.config, results=results, figures=drawn, notes=notes
    )


def since(started: float) -> str:
    return f"{time.perf_counter() - started:.0f} s"
