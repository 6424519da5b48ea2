"""Tables and figures of a removal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsurgery import evaluation
from gradsurgery.evaluation.trade_off import TradeOff
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.removal import RemovalConfig
from gradsurgery.runs.removal_run import RemovalData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[str, dict[str, list[tuple[float, float]]]]


def result_lines(results: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each model, before and after removal, and calibrated."""
    lines = []
    for name in models:
        result = results[name]
        for stage in ("before", "after", "calibrated"):
            if stage in result:
                label = name if "after" not in result else f"{name}, {stage} removal"
                label = f"{name}, calibrated" if stage == "calibrated" else label
                lines.append({"model": label, **{f"{c} loss": loss for c, loss in result[stage].items()}})
                lines[-1] |= {"tokens/s": int(result["tokens_per_second"]), "training FLOPs": result["flops"]}
    return lines


def curves_of(metrics: Sequence[Mapping[str, Any]], kind: str = "") -> Curves:
    """Model -> category -> ``[(step, loss)]`` of a kind of evaluation: plain, ``removed`` or ``calibrated``."""
    found: Curves = {}
    for line in metrics:
        for key, value in line.items():
            before, _, category = key.removeprefix("eval/").rpartition("/")
            if key.startswith("eval/") and before == kind:
                found.setdefault(line["model"], {}).setdefault(category, []).append((line["step"], value))
    return found


def trade_offs(metrics: Sequence[Mapping[str, Any]], roles: Mapping[str, Sequence[str]]) -> dict[str, list[TradeOff]]:
    """Checkpoints of each model as they would be released: after removal, calibrated where that was asked for."""
    found: dict[str, list[TradeOff]] = {}
    for kind in ("", "removed", "calibrated"):
        for model, curves in curves_of(metrics, kind).items():
            found[model] = evaluation.trade_off(curves, roles["forget"], roles["retain"])
    return found


def write_report(
    config: RemovalConfig, folder: RunFolder, loaded: RemovalData, title: str, notes: Sequence[str]
) -> str:
    """``plots/`` and ``report.html``; returns the table of losses."""
    results = folder.results()
    lines = result_lines(results, config.models)
    stages = {name: {s: results[name][s] for s in ("before", "after") if s in results[name]} for name in config.models}
    reference = results.get("data_filter", {}).get("before")
    figures = {
        "losses": ("Held-back loss of each model, before and after removal", evaluation.loss_bars(stages, reference))
    }
    curves = curves_of(folder.metrics)
    curves |= {f"{name}, removed": of for name, of in curves_of(folder.metrics, "removed").items()}
    if curves:
        figures["curves"] = ("Held-back loss during training (a sample)", evaluation.training_curves(curves))
    if norms := results.get("sgtm", {}).get("grad_norms"):
        figures["grad_norms"] = (
            "Relative gradient norms of forget and other units, before removal",
            evaluation.grad_norm_plot(norms),
        )
    figures |= protocol_figures(config, folder, loaded)
    tables = {"Losses (nats per token, held back)": lines, "Training rows": loaded.rows.summary()}
    relearned = [
        {"model": name, "steps": of["relearn"]["steps"], "to a forget loss of": of["relearn"]["level"]}
        for name, of in results.items()
        if "relearn" in of
    ]
    if relearned:
        tables["Relearning (– : not within the steps)"] = relearned
    (folder / "plots").mkdir(exist_ok=True)
    for file, (_, figure) in figures.items():
        figure.savefig(folder / "plots" / f"{file}.png")
    evaluation.write_report(
        folder / "report.html",
        title=title,
        config=folder.config,
        results=tables,
        figures=dict(figures.values()),
        notes=notes,
    )
    return evaluation.table(lines)


def protocol_figures(config: RemovalConfig, folder: RunFolder, loaded: RemovalData) -> dict[str, tuple[str, Figure]]:
    """Figures of the protocols that were asked for."""
    results, out = folder.results(), {}
    if config.protocols.trade_off and (points := trade_offs(folder.metrics, loaded.roles)):
        points = {name: of for name, of in points.items() if name in config.models}
        out["trade_off"] = ("Forget against retain loss along the checkpoints", evaluation.trade_off_plot(points))
    if relearned := {name: of["relearn"] for name, of in results.items() if "relearn" in of}:
        curves = {name: [(p["step"], p["forget"]) for p in of["curve"]] for name, of in relearned.items()}
        level = next(iter(relearned.values()))["level"]
        out["relearning"] = ("Relearning on equal forget and retain data", evaluation.relearning_plot(curves, level))
    if tokens := {name: of["token_losses"] for name, of in results.items() if "token_losses" in of}:
        drawn = {
            category: {name: of["density"][category] for name, of in tokens.items()}
            for category in next(iter(tokens.values()))["density"]
        }
        at = next(iter(tokens.values()))["at"]
        out["token_losses"] = ("Losses of single tokens", evaluation.density_plot(drawn, at, "loss (nats per token)"))
    return out
