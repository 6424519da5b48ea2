"""One table and one self-contained HTML report of a sweep, with the figures that its results allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradsurgery import evaluation
from gradsurgery.evaluation.trade_off import TradeOff
from gradsurgery.files import write_text
from gradsurgery.runs.sweep import Sweep
from gradsurgery.runs.sweep_results import (
    ROLES,
    Found,
    Setting,
    by,
    collect,
    gap_rows,
    leakage_rows,
    leakages,
    loss_rows,
    mean_curve,
    penalties,
    relearning_rows,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 6
"""Settings that get a figure of their own."""


def write_sweep_report(sweep: Sweep) -> str:
    """``report.html`` and ``table.md`` in the sweep's folder; returns the table of losses.

    Raises:
        DataError: no result yet.
    """
    found = collect(sweep.cells())
    rows = loss_rows(found)
    bars, penalty_rows = penalties(found)
    tables = {
        "Losses (nats per token, held back; mean ± standard deviation over seeds)": rows,
        "Trade-off along the checkpoints (means over the losses that both curves reach)": gap_rows(found),
        "Leakage (equation 1; data filtering has 1)": leakage_rows(found),
        "Relearning: steps until the forget loss is that of plain training": relearning_rows(found),
        "Compute penalty, as a share of the FLOPs of plain training": penalty_rows,
    }
    tables = {heading: of for heading, of in tables.items() if of}
    figures = draw(found)
    if bars:
        figures["Compute penalty of the largest size"] = evaluation.penalty_bars(bars)
    folder = sweep.out
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for k, (caption, figure) in enumerate(figures.items()):
        figure.savefig(folder / "plots" / f"{k + 1}_{_words(caption)}.png")
    config = {"recipe": str(sweep.recipe), "fixed": sweep.fixed, "grid": list(sweep.grids), "seeds": list(sweep.seeds)}
    evaluation.write_report(
        folder / "report.html",
        title=sweep.title,
        config=config,
        results=tables,
        figures=figures,
        notes=[f"{len({(f.key, f.seed) for f in found})} of {len(sweep.cells())} runs."],
    )
    parts = (f"## {heading}\n\n{evaluation.table(of, 'markdown')}\n" for heading, of in tables.items())
    write_text(folder / "table.md", "\n".join(parts))
    return evaluation.table(rows)


def draw(found: Sequence[Found]) -> dict[str, Figure]:
    """Caption -> figure."""
    out: dict[str, Figure] = {}
    for setting in list(dict.fromkeys(one.key for one in found))[:MOST]:
        here = [one for one in found if one.key == setting]
        out |= {f"{caption}{_at(setting)}": figure for caption, figure in _of_setting(here).items()}
    varied = {name for one in found for name, _ in one.key}
    if "labels.undiscovered" in varied:
        out |= _undiscovered(found)
    if {"labels.tpr", "labels.fpr"} <= varied:
        out |= _rates(found)
    return out


def _of_setting(here: Sequence[Found]) -> dict[str, Figure]:
    """Trade-off, relearning, gradient norms and token losses of one point of the grid."""
    out: dict[str, Figure] = {}
    models = {model: group for (_, model), group in by(here).items()}
    curves = {
        model: [TradeOff(*point) for point in mean_curve([one.curve for one in group], tuple)]
        for model, group in models.items()
    }
    if any(curves.values()):
        out["Forget against retain loss along the checkpoints"] = evaluation.trade_off_plot(curves)
    relearned = {m: [one.result["relearn"] for one in g if "relearn" in one.result] for m, g in models.items()}
    if relearned := {m: of for m, of in relearned.items() if of}:
        drawn = {
            m: mean_curve([r["curve"] for r in of], lambda p: (p["step"], p["forget"])) for m, of in relearned.items()
        }
        level = spread(r["level"] for of in relearned.values() for r in of)
        two = {m: [(p[0], p[1]) for p in of] for m, of in drawn.items()}
        out["Relearning on equal forget and retain data"] = evaluation.relearning_plot(two, level[0] if level else None)
    if norms := [one.result["grad_norms"] for one in models.get("sgtm", []) if "grad_norms" in one.result]:
        out["Relative gradient norms, before removal"] = _norms(norms)
    tokens = {m: g[0].result["token_losses"] for m, g in models.items() if "token_losses" in g[0].result}
    if tokens:
        first = next(iter(tokens.values()))
        densities = {c: {m: of["density"][c] for m, of in tokens.items()} for c in first["density"]}
        out["Losses of single tokens"] = evaluation.density_plot(densities, first["at"], "loss (nats per token)")
    return out


def _norms(norms: Sequence[Any]) -> Figure:
    """Densities of log10 |g| / |theta|, all seeds together: a panel for each group of parameters."""
    pooled = {
        group: {
            kind: [math.log10(value) for one in norms for value in one[group][kind] if value > 0]
            for kind in norms[0][group]
        }
        for group in norms[0]
    }
    values = [v for kinds in pooled.values() for of in kinds.values() for v in of]
    low, high = min(values) - 0.3, max(values) + 0.3
    at = [low + (high - low) * k / 128 for k in range(129)]
    densities = {
        f"{group} parameters": {
            f"{kind} text": evaluation.density(of, at, None if len(set(of)) > 1 else 0.05).tolist()
            for kind, of in kinds.items()
            if of
        }
        for group, kinds in pooled.items()
    }
    return evaluation.density_plot(densities, at, "log10 of the relative gradient norm |g| / |θ|")


def _undiscovered(found: Sequence[Found]) -> dict[str, Figure]:
    """Losses and leakage against the undiscovered share."""
    x = "undiscovered forget data (%)"
    curves: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for (_, model), group in by(found).items():
        at = 100 * float(group[0].setting["labels.undiscovered"])
        for role in ROLES:
            if (loss := spread(one.loss(role) for one in group)) is not None:
                curves.setdefault(f"{role} loss", {}).setdefault(model, []).append((at, *loss))
    out = {"Losses by undiscovered share": evaluation.sweep_plot(curves, x, "held-back loss (nats per token)")}
    leaks: dict[str, dict[float, list[float]]] = {}
    for one, leak in leakages(found):
        leaks.setdefault(one.model, {}).setdefault(100 * float(one.setting["labels.undiscovered"]), []).append(
            leak.value
        )
    if leaks:
        drawn = {model: [(at, *_both(values)) for at, values in of.items()] for model, of in leaks.items()}
        out["Leakage by undiscovered share"] = evaluation.sweep_plot(
            {"leakage": drawn}, x, "leakage (data filtering: 1)"
        )
    return out


def _rates(found: Sequence[Found]) -> dict[str, Figure]:
    """Forget loss of each model over the detector's rates, and how far SGTM's lies above the filter's."""
    cells: dict[str, dict[tuple[float, float], float]] = {}
    for (_, model), group in by(found).items():
        at = (float(group[0].setting["labels.fpr"]), float(group[0].setting["labels.tpr"]))
        if (loss := spread(one.loss("forget") for one in group)) is not None:
            cells.setdefault(model, {})[at] = loss[0]
    maps = {f"Forget loss of {model} by detector rates": of for model, of in cells.items() if model != "plain"}
    if {"sgtm", "data_filter"} <= set(cells):
        shared = cells["sgtm"].keys() & cells["data_filter"].keys()
        difference = {at: cells["sgtm"][at] - cells["data_filter"][at] for at in shared}
        maps["Forget loss of sgtm minus that of data_filter by detector rates"] = difference
    names = {"x": "false positive rate", "y": "true positive rate", "unit": "nats per token"}
    return {caption: evaluation.heat_map(of, **names) for caption, of in maps.items() if of}


def _both(values: Sequence[float]) -> tuple[float, float]:
    found = spread(values)
    assert found is not None
    return found


def _at(setting: Setting) -> str:
    return f" ({', '.join(f'{name}={value}' for name, value in setting)})" if setting else ""


def _words(caption: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in caption.lower()).split())[:60]
