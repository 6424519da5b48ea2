"""Figures of tiers; made as those of `gradsurgery.evaluation.plots`, legible in grey."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from gradsurgery.errors import DataError
from gradsurgery.evaluation.plots import AFTER, BEFORE, _legend, _panels, _style
from gradsurgery.evaluation.tiers.curves import Curve
from gradsurgery.evaluation.tiers.facts import Recall
from gradsurgery.evaluation.tiers.recovery import RULES, Recovery
from gradsurgery.evaluation.tiers.scores import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metric = Literal["loss", "accuracy"]
UNITS = {"loss": "held-back loss (nats per token)", "accuracy": "next-token accuracy"}
HATCHES = ("", "//", "..", "xx", "\\\\", "++")


def tier_bars(scores: Mapping[str, Scores], metric: Metric = "loss") -> Figure:
    """``evaluate_tiers``' scores: a panel for each category, a bar for each tier."""
    categories = _categories(scores)
    figure, panels = _panels(len(categories), "categories")
    for axes, category in zip(panels, categories, strict=True):
        _bars(axes, {name: of[category][metric] for name, of in scores.items()})
        axes.set(title=category, ylabel=UNITS[metric])
    return figure


def wrong_key_bars(curve: Curve, metric: Metric = "loss") -> Figure:
    """``wrong_keys``' curve: C1, the wrong keys with each of them as a dot, and C2."""
    if not curve["points"]:
        raise DataError("there is nothing to draw: no wrong keys given.")
    (at,) = curve["points"][-1:]
    categories = list(curve["public"])
    figure, panels = _panels(len(categories), "categories")
    for axes, category in zip(panels, categories, strict=True):
        found = at[metric][category]
        ends = [curve[tier][category][metric] for tier in ("public", "keyed")]  # type: ignore[literal-required]
        _bars(axes, {"C1": ends[0], f"{at['draws']} wrong keys": found["mean"], "C2": ends[1]}, [0, found["std"], 0])
        axes.plot([1] * len(found["values"]), found["values"], "D", color="#000000", markersize=3)
        axes.set(title=category, ylabel=UNITS[metric])
    return figure


def tier_curves(curves: Mapping[str, Curve], share: str = "share of the key", metric: Metric = "loss") -> Figure:
    """Curves of ``partial_keys``, ``corrupted_keys`` and ``corrupted_weights``: means, with bands of all values.

    Args:
        curves: Name of the series -> curve; a panel for each category. The tiers of the first one are drawn as lines.
        share: What the horizontal axis is.
        metric: ``"loss"`` or ``"accuracy"``.
    """
    first = next(iter(curves.values()), None)
    figure, panels = _panels(len(first["public"]) if first else 0, "curves")
    for axes, category in zip(panels, first["public"] if first else (), strict=True):
        assert first is not None
        for tier, dash in (("public", ":"), ("keyed", "--")):
            level = first[tier][category][metric]  # type: ignore[literal-required]
            axes.axhline(level, color="#7F7F7F", linestyle=dash, label={"public": "C1", "keyed": "C2"}[tier])
        for i, (name, curve) in enumerate(curves.items()):
            shares = [at["share"] for at in curve["points"]]
            found = [at[metric][category] for at in curve["points"]]
            style = _style(i)
            axes.plot(shares, [f["mean"] for f in found], label=name, markersize=4, **style)
            low, high = ([f[end] for f in found] for end in ("low", "high"))  # type: ignore[literal-required]
            axes.fill_between(shares, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=category, xlabel=share, ylabel=UNITS[metric])
    _legend(figure, panels)
    return figure


def recovery_bars(found: Mapping[str, Mapping[str, Recovery]]) -> Figure:
    """``recovery_by_magnitude``'s scores: AUC of each rule, a panel for each kind of unit; chance is dashed."""
    figure, panels = _panels(len(found), "recoveries")
    for axes, (kind, rules) in zip(panels, found.items(), strict=True):
        _bars(axes, {rule: rules[rule]["auc"] for rule in RULES})
        axes.axhline(0.5, color="#D55E00", linestyle="--", label="chance")
        axes.set(title=kind, ylabel="AUC of telling keyed units", ylim=(0, 1.1))
    _legend(figure, panels)
    return figure


def recall_bars(recalls: Mapping[str, Recall]) -> Figure:
    """``tier_recall``'s figures: top-1 accuracy and exact match of each tier."""
    figure, panels = _panels(2 if recalls else 0, "recalls")
    for axes, metric, title in zip(panels, ("top1", "exact"), ("top-1 accuracy", "exact match"), strict=True):
        _bars(axes, {name: found[metric] for name, found in recalls.items()})  # type: ignore[literal-required]
        axes.set(title=title, ylabel="share", ylim=(0, 1.1))
    return figure


def gain_bars(gains: Mapping[str, float]) -> Figure:
    """``relative_gains``: what each attack gains, next to the key."""
    figure, panels = _panels(1 if gains else 0, "gains")
    for axes in panels:
        _bars(axes, {**gains, "the key": 1.0})
        axes.set(ylabel="gain, as a share of the key's")
    return figure


def _bars(axes: Any, values: Mapping[str, float], errors: list[float] | None = None) -> None:
    """Bars that differ in lightness and hatching."""
    for i, value in enumerate(values.values()):
        colour = BEFORE if i == 0 else AFTER
        error = {"yerr": errors[i], "capsize": 4} if errors and errors[i] else {}
        bars = axes.bar([i], [value], 0.6, color=colour, hatch=HATCHES[i % len(HATCHES)], edgecolor="black", **error)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(range(len(values)), list(values), rotation=20, ha="right")
    axes.margins(y=0.12)


def _categories(scores: Mapping[str, Scores]) -> list[str]:
    return list(dict.fromkeys(category for of in scores.values() for category in of))
