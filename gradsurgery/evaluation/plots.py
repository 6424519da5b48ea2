"""Figures: training curves, losses before and after removal, gradient norms.

Every figure can be read in grey and by the colour-blind: series differ in lightness (colours of Okabe and Ito) and also
in dash, marker or hatching. Figures are made without pyplot: no display, no global state, no window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsurgery.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BEFORE, AFTER = "#D9D9D9", "#0072B2"

Series = Sequence[tuple[float, float]]


def training_curves(runs: Mapping[str, Mapping[str, Series]], unit: str = "loss (nats per token)") -> Figure:
    """``{run: {category: [(step, value), …]}}``: a panel for each category, a line for each run."""
    categories = list(dict.fromkeys(category for curves in runs.values() for category in curves))
    figure, panels = _panels(len(categories), "curves")
    for axes, category in zip(panels, categories, strict=True):
        for i, (run, curves) in enumerate(runs.items()):
            if points := curves.get(category):
                steps, values = zip(*points, strict=True)
                every = max(1, len(points) // 8)
                axes.plot(steps, values, label=run, markersize=4, markevery=(i % every, every), **_style(i))
        axes.set(title=category, xlabel="optimizer step", ylabel=unit)
    _legend(figure, panels)
    return figure


def loss_bars(
    runs: Mapping[str, Mapping[str, Mapping[str, float]]],
    reference: Mapping[str, float] | None = None,
    reference_name: str = "data filter",
    unit: str = "held-back loss (nats per token)",
) -> Figure:
    """``{run: {"before": {category: loss}, "after": {category: loss}}}``: a panel for each category.

    Each run has a plain bar before removal and a hatched one after it, where it has an after; ``reference`` draws a
    dashed line in each category's panel.
    """
    categories = list(dict.fromkeys(c for stages in runs.values() for losses in stages.values() for c in losses))
    figure, panels = _panels(len(categories), "bars")
    for axes, category in zip(panels, categories, strict=True):
        for stage, shift, colour, hatch in (("before", -0.2, BEFORE, ""), ("after", 0.2, AFTER, "//")):
            values = {i: s[stage][category] for i, s in enumerate(runs.values()) if category in s.get(stage, {})}
            positions = [i + (shift if _has_after(runs, i) else 0.0) for i in values]
            bars = axes.bar(
                positions,
                list(values.values()),
                0.38,
                label=f"{stage} removal",
                color=colour,
                hatch=hatch,
                edgecolor="black",
            )
            ink = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # legible on the reference line
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2, bbox=ink)
        if reference and category in reference:
            axes.axhline(reference[category], color="#D55E00", linestyle="--", label=reference_name)
        axes.set_xticks(range(len(runs)), list(runs), rotation=20, ha="right")
        axes.set(title=category, ylabel=unit)
        axes.margins(y=0.12)
    _legend(figure, panels)
    return figure


def grad_norm_plot(norms: Mapping[str, Mapping[str, Sequence[float]]], bins: int = 24) -> Figure:
    """``{group: {kind: [|g| / |theta|, …]}}`` (see ``relative_grad_norms``): a panel for each group, shared axes.

    Histograms over a logarithmic axis; a marked line stands at each kind's median.
    """
    positive = [n for kinds in norms.values() for values in kinds.values() for n in values if n > 0]
    if not positive:
        raise DataError("there is no gradient norm above zero to draw.")
    low, high = math.log10(min(positive)), math.log10(max(positive))
    width = max(high - low, 0.1) / bins
    edges = [10 ** (low - width / 2 + i * width) for i in range(bins + 2)]
    figure, panels = _panels(len(norms), "gradient norms")
    for axes, (group, kinds) in zip(panels, norms.items(), strict=True):
        for i, (kind, values) in enumerate(kinds.items()):
            drawn = sorted(n for n in values if n > 0)
            style = _style(i)
            axes.hist(drawn, edges, histtype="step", color=style["color"], linestyle=style["linestyle"], linewidth=1.6)
            if drawn:
                median = drawn[len(drawn) // 2]
                axes.plot(
                    [median] * 2, [0, 1], transform=axes.get_xaxis_transform(), alpha=0.8, label=f"{kind} text", **style
                )
        axes.set_xscale("log")
        axes.set(title=f"{group} parameters", xlabel="relative gradient norm |g| / |θ|", ylabel="sequences")
    for axes in panels[1:]:
        axes.sharex(panels[0])
    _legend(figure, panels)
    return figure


def _panels(count: int, what: str) -> tuple[Figure, list[Any]]:
    if not count:
        raise DataError(f"there is nothing to draw: no {what} given.")
    from matplotlib.figure import Figure  # only whoever draws needs matplotlib

    figure = Figure(figsize=(min(4.6 * count, 18.0), 3.6), dpi=110, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.grid(axis="y", color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _style(i: int) -> dict[str, Any]:
    """Colour, dash and marker of a series; after seven, other pairs of dash and marker (49 in all), markers open."""
    turn = i // 7
    style = {"color": COLOURS[i % 7], "linestyle": DASHES[(i + 2 * turn) % 7], "marker": MARKERS[(i + 3 * turn) % 7]}
    return style | ({"markerfacecolor": "white"} if turn else {})


def _has_after(runs: Mapping[str, Mapping[str, Mapping[str, float]]], index: int) -> bool:
    return "after" in list(runs.values())[index]


def _legend(figure: Figure, panels: Sequence[Any]) -> None:
    """One legend for the whole figure, below it, with each name once."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=min(len(named), 5), frameon=False
    )
