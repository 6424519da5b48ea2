"""Figures of the paper's protocols (SGTM, arXiv 2512.05648); legible in grey, as those of `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsurgery.errors import DataError
from gradsurgery.evaluation.plots import AFTER, BEFORE, Series, _panels, _style
from gradsurgery.evaluation.trade_off import TradeOff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--")
NATS = "loss (nats per token)"


def trade_off_plot(points: Mapping[str, Sequence[TradeOff]]) -> Figure:
    """Forget against retain loss, a line for each model; the last checkpoint has the large marker (figures 1, 4a)."""
    drawn = {name: of for name, of in points.items() if of}
    figure, (axes,) = _panels(1 if drawn else 0, "checkpoints")
    for i, (name, of) in enumerate(drawn.items()):
        x, y = [p.retain for p in of], [p.forget for p in of]
        axes.plot(x, y, label=name, markersize=4, linewidth=1.2, **_style(i))
        axes.plot(x[-1:], y[-1:], markersize=10, **_style(i))
    axes.set(xlabel=f"retain {NATS}", ylabel=f"forget {NATS}", title="up and to the left is better")
    _side_legend(figure, [axes])
    return figure


def sweep_plot(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]], x: str, y: str, log: bool = False
) -> Figure:
    """``{panel: {model: [(x, mean, spread), …]}}`` with error bars, such as the undiscovered sweep (figures 3, 5).

    Args:
        x: Name of the horizontal axis, with its unit; symmetric logarithmic, since 0 is on it.
        y: Name of the vertical axis.
        log: Logarithmic vertical axis.
    """
    figure, panels = _panels(len(curves), "settings")
    for axes, (panel, of) in zip(panels, curves.items(), strict=True):
        for i, (name, points) in enumerate(of.items()):
            if points:
                at, mean, spread = zip(*sorted(points), strict=True)
                axes.errorbar(at, mean, yerr=spread, label=name, markersize=4, capsize=3, linewidth=1.2, **_style(i))
        positive = sorted({p[0] for points in of.values() for p in points if p[0] > 0})
        if positive and positive[-1] / positive[0] >= 20:
            axes.set_xscale("symlog", linthresh=positive[0])
        if len(every := sorted({p[0] for points in of.values() for p in points})) <= 8:
            axes.set_xticks(every, [f"{value:g}" for value in every])
            axes.minorticks_off()
        if log:
            axes.set_yscale("log")
        axes.set(title=panel, xlabel=x, ylabel=y)
    _side_legend(figure, panels)
    return figure


def relearning_plot(curves: Mapping[str, Series], level: float | None = None) -> Figure:
    """Forget loss against finetuning steps; the loss that counts as back is dashed (figure 6a)."""
    figure, (axes,) = _panels(1 if curves else 0, "curves")
    for i, (name, points) in enumerate(curves.items()):
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, label=name, markersize=4, linewidth=1.2, **_style(i))
    if level is not None:
        axes.axhline(level, color="#7F7F7F", linestyle=(0, (2, 2)), label="no filter")
    axes.set(xlabel="finetuning step", ylabel=f"forget {NATS}")
    _side_legend(figure, [axes])
    return figure


def penalty_bars(penalties: Mapping[str, Mapping[str, float]]) -> Figure:
    """``{category: {model: compute penalty}}`` in percent of the training compute (figure 9)."""
    figure, panels = _panels(len(penalties), "penalties")
    for axes, (category, of) in zip(panels, penalties.items(), strict=True):
        for i, (name, value) in enumerate(of.items()):
            colour = BEFORE if i % 2 == 0 else AFTER
            bars = axes.bar([name], [100 * value], 0.6, color=colour, hatch=HATCHES[i % 7], edgecolor="black")
            axes.bar_label(bars, fmt="%.0f%%", fontsize=8, padding=2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.tick_params(axis="x", rotation=20)
        axes.set(title=category, ylabel="compute penalty (% of the FLOPs)")
        axes.margins(y=0.15)
    return figure


def density_plot(densities: Mapping[str, Mapping[str, Sequence[float]]], at: Sequence[float], x: str) -> Figure:
    """``{panel: {series: [density at each point]}}``: losses of tokens, gradient norms (figures 4b, 6b)."""
    figure, panels = _panels(len(densities), "densities")
    for axes, (panel, of) in zip(panels, densities.items(), strict=True):
        for i, (name, values) in enumerate(of.items()):
            every = max(1, len(at) // 8)
            axes.plot(at, values, label=name, markersize=4, markevery=(i % every, every), linewidth=1.2, **_style(i))
        axes.set(title=panel, xlabel=x, ylabel="density")
    _side_legend(figure, panels)
    return figure


def heat_map(values: Mapping[tuple[float, float], float], x: str, y: str, unit: str, title: str = "") -> Figure:
    """``{(x, y): value}`` as a grid with its numbers written in, such as loss over TPR and FPR (figure 11)."""
    if not values:
        raise DataError("there is nothing to draw: no cells given.")
    columns, rows = sorted({at[0] for at in values}), sorted({at[1] for at in values})
    figure, (axes,) = _panels(1, "cells")
    grid = [[values.get((column, row), float("nan")) for column in columns] for row in rows]
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="cividis")  # one lightness ramp, also in grey
    low, high = min(values.values()), max(values.values())
    for (column, row), value in values.items():
        dark = value < low + 0.5 * (high - low)
        place = (columns.index(column), rows.index(row))
        axes.annotate(f"{value:.2f}", place, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.grid(False)
    axes.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
    axes.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
    axes.set(xlabel=x, ylabel=y, title=title)
    figure.colorbar(image, label=unit)
    return figure


def _side_legend(figure: Figure, panels: Sequence[Any]) -> None:
    """One legend to the right of all panels, with each name once; the figure grows by it."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + 0.5 + 0.085 * max(map(len, named)), max(height, 0.24 * len(named) + 0.6))
        figure.legend(list(named.values()), list(named), loc="outside right upper", frameon=False)
