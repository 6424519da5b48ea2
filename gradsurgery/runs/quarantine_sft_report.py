"""Tables, sentences and figures of a supervised run with a quarantine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsurgery import evaluation
from gradsurgery.evaluation import DetectorRates
from gradsurgery.runs import report
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.quarantine_controls import verdicts
from gradsurgery.runs.quarantine_sft import FILTER, VARIANTS, QuarantineSftConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("forget", "retain", "near")

RETAIN_WEIGHT = 10.0
"""What a nat of lost retain text counts, in nats of forget text: what is worth having raises the forget loss by one and
the retain loss by less than a tenth. At equal weights a variant wins that spoils everything alike."""


def released(name: str, result: Mapping[str, Any]) -> Mapping[str, float]:
    """The losses of what would be released: without the quarantine, where anything was put into it on purpose."""
    return result["on" if name in ("plain", FILTER, "start") else "off"]  # type: ignore[no-any-return]


def merits(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """By variant, after ablation: the forget loss above that of ``plain``, less ten times the retain loss above it.

    A retain loss below that of ``plain`` earns nothing.
    """
    plain = released("plain", results["plain"])
    out = {}
    for name in names:
        found = released(name, results[name])
        out[name] = found["forget"] - plain["forget"] - RETAIN_WEIGHT * max(found["retain"] - plain["retain"], 0.0)
    return out


def loss_lines(results: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Losses with the quarantine and without it, and how far what is released lies above ``plain``."""
    plain = released("plain", results["plain"])
    start = results["start"]["on"]
    lines: list[dict[str, Any]] = [{"variant": "start", **{f"{kind}, on": start[kind] for kind in KINDS}}]
    for name in names:
        result = results[name]
        line: dict[str, Any] = {"variant": name + (" (control)" if VARIANTS[name].control else "")}
        line |= {f"{kind}, {stage}": result[stage][kind] for stage in ("on", "off") for kind in KINDS}
        if name != "plain":
            line |= {f"{kind} above plain": released(name, result)[kind] - plain[kind] for kind in KINDS}
        lines.append(line)
    return lines


def gate_lines(results: Mapping[str, Any], names: Sequence[str], rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """What was flagged during training, by kind, with the precision that this makes; the quarantine's energy."""
    lines = []
    for name in names:
        found, capacity = results[name]["during"], results[name]["adapter"]["capacity"]
        line: dict[str, Any] = {"variant": name, "recall": found.get("flagged/forget")}
        line |= {f"flagged {kind}": found.get(f"flagged/{kind}") for kind in rows if kind != "forget"}
        if "flagged/forget" in found:
            others = {kind: count for kind, count in rows.items() if kind != "forget" and count}
            wrong = sum(found.get(f"flagged/{kind}", 0.0) * count for kind, count in others.items())
            share = wrong / max(sum(others.values()), 1)
            rates = DetectorRates.from_rates(found["flagged/forget"], share, rows["forget"], sum(others.values()))
            line["precision"] = rates.precision
        line |= {"energy": found.get("energy"), "of parameters": capacity["parameters"]}
        line["of rates"] = capacity["learning_rate"]
        lines.append(line)
    return lines


def drift_lines(results: Mapping[str, Any], names: Sequence[str], rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """Cosines with the direction, in training and after it; mean log-probabilities in training."""
    lines = []
    for name in names:
        found = results[name]["during"]
        line: dict[str, Any] = {"variant": name}
        line |= {f"score, {kind}": found.get(f"score/{kind}") for kind in rows}
        line |= {f"cosine, {kind}": results[name]["cosines"][kind] for kind in KINDS}
        line |= {f"log p, {kind}": found.get(f"log_probability/{kind}") for kind in rows}
        lines.append(line)
    return lines


def relearn_lines(results: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Steps until the forget loss is back, and where the probe ended."""
    lines = []
    for name in ("start", *names):
        if probe := results[name].get("relearn"):
            end = probe["curve"][-1]
            lines.append(
                {
                    "variant": name,
                    "steps until back": probe["steps"],
                    "to a forget loss of": probe["level"],
                    "forget at first": probe["curve"][0]["forget"],
                    "forget at the end": end["forget"],
                    "retain at the end": end["retain"],
                    "after steps": end["step"],
                }
            )
    return lines


def write_report(config: QuarantineSftConfig, folder: RunFolder, seconds: str) -> str:
    """``plots/`` and ``report.html``; returns the tables and the sentences."""
    results = folder.results()
    names = [name for name in config.variants if name in results]
    worth = merits(results, names)
    said = verdicts(worth, "nats")
    folder.store("verdicts", {"merits": worth, "said": said})
    tables: dict[str, Any] = {
        "Losses in nats per token with the quarantine (on) and after ablation (off)": loss_lines(results, names),
        "What was flagged in training, energy into the quarantine, its capacity over the kept part's": gate_lines(
            results, names, config.rows
        ),
        "Cosine with the direction (score: in training, cosine: after it); log-probability of a token": drift_lines(
            results, names, config.rows
        ),
        f"Merit after ablation: the forget loss above plain, less {RETAIN_WEIGHT:g} times the retain loss above it": [
            {"variant": name, "nats": value, "control": "yes" if VARIANTS[name].control else "no"}
            for name, value in worth.items()
        ],
        "Relearning (– : not within the steps)": relearn_lines(results, names),
        "Variants": [{"variant": name, "what it does": VARIANTS[name].about} for name in names],
        "Cost": [report.cost_line(results[name], name) for name in names],
    }
    tables = {name: table for name, table in tables.items() if table}
    figures: dict[str, Figure] = {
        "Held-back losses with the quarantine (before) and without it (after)": evaluation.loss_bars(
            {name: {"before": results[name]["on"], "after": results[name]["off"]} for name in names},
            results["start"]["on"],
            "before the adapter",
        )
    }
    probes = {name: results[name]["relearn"] for name in ("start", *names) if results[name].get("relearn")}
    if probes:
        curves = {name: [(p["step"], p["forget"]) for p in of["curve"]] for name, of in probes.items()}
        figures["Relearning on equal parts of both"] = evaluation.relearning_plot(
            curves, results["plain"]["on"]["forget"]
        )
    about = {
        "bilingual": "Near: held-back sentences of the retain language with the most words of the forget language.",
        "topics": "Near: held-back text of the adjacent topics.",
    }
    notes = [*said, about[config.text.kind], f"Wall time of the last start: {seconds}."]
    report.write(folder, "Training beside a quarantine", tables, figures, notes)
    shown = [evaluation.table(table) for name, table in tables.items() if name not in ("Variants", "Cost")]
    return "\n\n".join([*shown, "\n".join(said)])
