from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradsurgery.errors import DataError
from gradsurgery.evaluation import tiers as typed
from gradsurgery.evaluation.tiers.curves import spread

tiers: Any = typed  # matplotlib's and our own types are not what is tested here
SCORES: Any = {
    "C1": {"en": {"loss": 3.0, "accuracy": 0.3}, "es": {"loss": 6.0, "accuracy": 0.1}},
    "C2": {"en": {"loss": 3.1, "accuracy": 0.3}, "es": {"loss": 4.0, "accuracy": 0.25}},
}


def point(share: float, *losses: float) -> Any:
    loss = {c: spread(losses) for c in ("en", "es")}
    return {"share": share, "draws": len(losses), "loss": loss, "accuracy": loss}


CURVE: Any = {"public": SCORES["C1"], "keyed": SCORES["C2"], "points": [point(0.5, 5.8, 5.9), point(1.0, 4.0)]}


def names(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_tier_bars() -> None:
    english, spanish = tiers.tier_bars(SCORES).axes
    assert [bar.get_height() for bar in spanish.patches] == [6.0, 4.0]
    assert english.patches[0].get_hatch() != english.patches[1].get_hatch()
    assert [tick.get_text() for tick in english.get_xticklabels()] == ["C1", "C2"]
    assert "accuracy" in tiers.tier_bars(SCORES, "accuracy").axes[0].get_ylabel()


def test_wrong_key_bars() -> None:
    curve: Any = {**CURVE, "points": [point(1.0, 5.8, 6.2)]}
    _, spanish = tiers.wrong_key_bars(curve).axes
    assert [bar.get_height() for bar in spanish.patches] == pytest.approx([6.0, 6.0, 4.0])
    assert [tick.get_text() for tick in spanish.get_xticklabels()][1] == "2 wrong keys"
    (dots,) = [line for line in spanish.lines if line.get_marker() == "D"]
    assert list(dots.get_ydata()) == [5.8, 6.2]


def test_tier_curves() -> None:
    figure = tiers.tier_curves({"partial": CURVE, "corrupted": CURVE})
    _, spanish = figure.axes
    assert names(figure) == ["C1", "C2", "partial", "corrupted"]
    assert [list(line.get_ydata()) for line in spanish.lines[:2]] == [[6.0, 6.0], [4.0, 4.0]]
    assert list(spanish.lines[2].get_xdata()) == [0.5, 1.0]
    assert spanish.lines[2].get_linestyle() != spanish.lines[3].get_linestyle()
    assert len(spanish.collections) == 2


def test_recovery_recall_and_gain_bars() -> None:
    one: Any = {rule: {"auc": 0.5} for rule in ("smallest", "largest", "outlier")}
    figure = tiers.recovery_bars({"mlp": one, "combined": one})
    assert [axes.get_title() for axes in figure.axes] == ["mlp", "combined"] and names(figure) == ["chance"]
    top1, exact = tiers.recall_bars({"C1": {"top1": 0.1, "exact": 0.0, "facts": 9}}).axes
    assert [axes.get_title() for axes in (top1, exact)] == ["top-1 accuracy", "exact match"]
    (gains,) = tiers.gain_bars({"random key": 0.05}).axes
    assert [bar.get_height() for bar in gains.patches] == [0.05, 1.0]


def test_figures_can_be_drawn(tmp_path: Path) -> None:
    for i, figure in enumerate([tiers.tier_bars(SCORES), tiers.wrong_key_bars(CURVE), tiers.tier_curves({"a": CURVE})]):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw() -> None:
    for draw in (tiers.tier_bars, tiers.tier_curves, tiers.recovery_bars, tiers.recall_bars, tiers.gain_bars):
        with pytest.raises(DataError, match="nothing to draw"):
            draw({})
    with pytest.raises(DataError, match="nothing to draw"):
        tiers.wrong_key_bars({**CURVE, "points": []})
