import numpy
import pytest
from matplotlib.colors import to_rgb

from gradsurgery.errors import DataError
from gradsurgery.evaluation import grad_norm_plot, loss_bars, training_curves
from gradsurgery.evaluation.plots import AFTER, BEFORE, COLOURS, DASHES, MARKERS, _style

LOSSES = {
    "unmasked": {"before": {"en": 4.5, "es": 4.6}},
    "sgtm": {"before": {"en": 7.2, "es": 4.6}, "after": {"en": 4.4, "es": 7.6}},
}


def lightness(colour):
    red, green, blue = to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_series_differ_without_colour():
    assert len({(dash, marker) for dash, marker in zip(DASHES, MARKERS, strict=True)}) == len(COLOURS) == 7
    styles = [_style(i) for i in range(49)]
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 49
    assert [style.get("markerfacecolor") for style in styles] == [None] * 7 + ["white"] * 42
    assert abs(lightness(BEFORE) - lightness(AFTER)) > 0.3


def test_training_curves_have_a_panel_for_each_category():
    figure = training_curves({"a": {"en": [(0, 7.6), (10, 5.0)], "es": [(0, 7.6)]}, "b": {"en": [(0, 7.5)]}})
    english, spanish = figure.axes
    assert [len(axes.lines) for axes in (english, spanish)] == [2, 1]
    assert (english.get_title(), english.get_xlabel()) == ("en", "optimizer step")
    assert english.get_ylabel() == "loss (nats per token)"
    assert english.lines[0].get_linestyle() != english.lines[1].get_linestyle()
    assert names(figure) == ["a", "b"]


def test_bars_show_before_after_and_the_reference():
    figure = loss_bars(LOSSES, reference={"es": 5.6})
    english, spanish = figure.axes
    assert sorted(bar.get_height() for bars in spanish.containers for bar in bars) == [4.6, 4.6, 7.6]
    assert [bar.get_hatch() for bar in english.patches] == ["", "", "//"]
    assert [numpy.ravel(line.get_ydata()).tolist() for line in spanish.lines] == [[5.6, 5.6]]
    assert len(english.lines) == 0
    assert names(figure) == ["before removal", "after removal", "data filter"]
    assert "nats" in english.get_ylabel()


def test_gradient_norms_share_their_axis():
    norms = {"forget": {"en": [0.01, 0.02, 0.0], "es": [0.1, 0.2]}, "retain": {"en": [0.1], "es": []}}
    figure = grad_norm_plot(norms)
    forget, retain = figure.axes
    assert forget.get_xlim() == retain.get_xlim()
    assert forget.get_xscale() == "log" and "|g|" in forget.get_xlabel()
    assert names(figure) == ["en text", "es text"]
    assert grad_norm_plot({"one": {"en": [0.5]}}).axes


def test_figures_can_be_drawn(tmp_path):
    for i, figure in enumerate([loss_bars(LOSSES), training_curves({"a": {"en": [(0, 1.0)]}})]):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw():
    for draw in (lambda: training_curves({}), lambda: loss_bars({}), lambda: grad_norm_plot({"a": {"en": [0.0]}})):
        with pytest.raises(DataError, match=r"nothing to draw|no gradient norm"):
            draw()
