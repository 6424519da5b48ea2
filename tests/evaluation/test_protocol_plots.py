"""Figures of the protocols show what they are given, with axes, units and series that differ without colour."""

import math
from typing import Any

import numpy
import pytest

from gradsurgery.errors import DataError
from gradsurgery.evaluation import (
    TradeOff,
    density_plot,
    heat_map,
    penalty_bars,
    relearning_plot,
    sweep_plot,
    trade_off_plot,
)


def names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_trade_off_has_retain_across_and_forget_up():
    figure = trade_off_plot(
        {"a": [TradeOff(1, 8.0, 6.0), TradeOff(2, 7.0, 5.0)], "b": [TradeOff(1, 9.0, 4.0)], "c": []}
    )
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("retain loss (nats per token)", "forget loss (nats per token)")
    assert [numpy.ravel(line.get_xdata()).tolist() for line in axes.lines] == [[6.0, 5.0], [5.0], [4.0], [4.0]]
    assert axes.lines[1].get_markersize() > axes.lines[0].get_markersize()
    assert names(figure) == ["a", "b"]


def test_fourteen_series_differ_without_colour():
    figure = relearning_plot({str(k): [(0, k), (1, k + 1)] for k in range(14)}, level=3.0)
    (axes,) = figure.axes
    lines: list[Any] = list(axes.lines[:-1])
    styles = {
        (
            line.get_linestyle(),
            tuple(line._unscaled_dash_pattern[1] or ()),
            line.get_marker(),
            line.get_markerfacecolor() == "white",
        )
        for line in lines
    }
    assert len(styles) == 14 and names(figure)[-1] == "no filter"
    assert axes.get_xlabel() == "finetuning step"


def test_a_sweep_has_its_values_as_ticks():
    figure = sweep_plot({"forget": {"a": [(10, 2.0, 0.1), (0, 1.0, math.nan), (0.1, 1.5, 0.2)]}}, "share (%)", "loss")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "0.1", "10"] and axes.get_xscale() == "symlog"
    assert numpy.ravel(axes.lines[0].get_ydata()).tolist() == [1.0, 1.5, 2.0]


def test_penalties_are_percent_and_densities_have_panels():
    bars = penalty_bars({"retain": {"sgtm": 0.05, "filter": -0.1}})
    drawn: list[Any] = list(bars.axes[0].patches)
    assert [round(bar.get_height()) for bar in drawn] == [5, -10]
    assert "%" in bars.axes[0].get_ylabel()
    figure = density_plot({"es": {"a": [0.0, 1.0]}, "en": {"a": [1.0, 0.0]}}, [0.0, 1.0], "loss (nats per token)")
    assert [axes.get_title() for axes in figure.axes] == ["es", "en"]


def test_a_heat_map_writes_its_numbers_and_leaves_gaps():
    figure = heat_map({(0.1, 0.9): 1.0, (0.2, 0.8): 2.0}, "fpr", "tpr", "nats")
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["1.00", "2.00"]
    held: Any = axes.images[0].get_array()
    grid = numpy.ma.filled(held, numpy.nan)
    assert numpy.isnan(grid).sum() == 2 and grid[1, 0] == 1.0 and grid[0, 1] == 2.0
    assert figure.axes[1].get_ylabel() == "nats"


@pytest.mark.parametrize("draw", [trade_off_plot, relearning_plot, penalty_bars])
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(DataError, match="nothing to draw"):
        draw({})
    with pytest.raises(DataError, match="nothing to draw"):
        heat_map({}, "x", "y", "z")
