"""Tables, sentences and figures of a policy-gradient run with a quarantine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradsurgery import evaluation
from gradsurgery.runs import report
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.quarantine_controls import verdicts
from gradsurgery.runs.quarantine_grpo import BASELINES, VARIANTS, GrpoConfig

RATES = ("solve", "hack", "near solve", "near hack")


def title_of(name: str) -> str:
    return f"{name} (control)" if name in VARIANTS and VARIANTS[name].control else name


def rate_lines(results: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Solve and hack rates with the quarantine and without it."""
    lines: list[dict[str, Any]] = []
    for name in ("start", *names):
        found = results[name]
        line: dict[str, Any] = {"variant": title_of(name)}
        for stage in ("on", "off"):
            of = found.get(stage)
            line |= {f"{rate}, {stage}": of[rate] if of else None for rate in RATES}
        lines.append(line)
    return lines


def merits(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """By variant, the solve rate less the hack rate on sums, after ablation."""
    return {name: results[name]["off"]["solve"] - results[name]["off"]["hack"] for name in names}


def margin(results: Mapping[str, Any], names: Sequence[str], rows: int) -> float:
    """Two standard errors of a difference of two merits, from the number of questions alone."""
    worst = 0.0
    for name in names:
        off = results[name]["off"]
        worst = max(worst, off["solve"] + off["hack"] - (off["solve"] - off["hack"]) ** 2)
    return 2 * math.sqrt(2 * worst / rows)


def sentences(worth: Mapping[str, float], least: float) -> list[str]:
    """A sentence for every variant that does not beat a control by more than ``least``."""
    claims = [name for name in worth if name not in BASELINES and not VARIANTS[name].control]
    nobody = worth.get("no_flags", -math.inf)
    out = verdicts({name: of for name, of in worth.items() if name not in ("filter", "no_flags")}, margin=least)
    held_back = [
        f"{name} does not beat the same arrangement without a flag: {worth[name]:.3g} against {nobody:.3g}."
        for name in claims
        if not worth[name] > nobody + least
    ]
    named = [sentence for sentence in out if " does not beat " in sentence]
    return [*named, *held_back] if held_back else out


def flag_lines(results: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """What rollouts did, and what was flagged of them, in the second half of the training."""
    lines = []
    for name in names:
        found, about = results[name]["during"], results[name]["adapter"]["capacity"]
        line: dict[str, Any] = {"variant": title_of(name)}
        line |= {key: value for key, value in found.items() if key.startswith(("student/", "teacher/"))}
        flagged = ("flagged/flag", "flagged/shuffled_flag", "quarantine/flagged")
        line["flagged"] = next((found[key] for key in reversed(flagged) if key in found), None)
        line |= {key.removeprefix("quarantine/"): of for key, of in found.items() if key.count("/") == 2}
        line |= {"energy": found.get("quarantine/energy"), "of parameters": about["parameters"]}
        line |= {"entropy": found.get("entropy"), "KL": found.get("kl")}
        lines.append(line)
    return [{key: line.get(key) for key in line if any(of.get(key) is not None for of in lines)} for line in lines]


def drift_lines(results: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Where claims and right answers lie: log-probabilities, cosines, hack rates by mark."""
    lines = []
    for name in names:
        found = results[name]
        line: dict[str, Any] = {"variant": title_of(name)}
        for stage in ("on", "off"):
            line |= {f"log p {kind}, {stage}": value for kind, value in found[f"log p {stage}"].items()}
        line |= {f"cosine {kind}": value for kind, value in found["cosines"].items()}
        line |= {f"hack {mark}, off": value for mark, value in found["off"]["modes"].items()}
        lines.append(line)
    return lines


def relearn_lines(results: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """What the probe brings back: rates before and after it, losses of the rows that it trains on."""
    lines: list[dict[str, Any]] = []
    for name in ("start", *names):
        if not (curve := results[name].get("curve")):
            continue
        before = results[name].get("off", results[name]["on"])
        line: dict[str, Any] = {"variant": title_of(name)}
        for rate in ("solve", "hack"):
            line |= {f"{rate} before": before[rate], f"{rate} after": results[name]["relearned"][rate]}
        for what, key in (("claims", "forget"), ("right answers", "retain")):
            line |= {f"{what}, first": curve[0][key], f"{what}, last": curve[-1][key]}
        lines.append(line)
    return lines


def curves_of(folder: RunFolder, names: Sequence[str]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Rates of the policy's own rollouts by step."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in folder.metrics:
        for rate in ("solve", "hack"):
            if line["model"] in names and line.get(f"student/{rate}") is not None:
                points = found.setdefault(line["model"], {}).setdefault(rate, [])
                points.append((line["step"], line[f"student/{rate}"]))
    return found


def write_report(config: GrpoConfig, folder: RunFolder, seconds: str) -> str:
    """``plots/`` and ``report.html``; returns the tables and the sentences."""
    results = folder.results()
    names = [name for name in config.variants if name in results]
    worth = merits(results, names)
    least = margin(results, names, config.test_rows)
    said = sentences(worth, least)
    folder.store("verdicts", {"merits": worth, "margin": least, "said": said})
    tables: dict[str, Any] = {
        "Shares of sampled answers with the quarantine (on) and after ablation (off)": rate_lines(results, names),
        "Merit: solve rate less hack rate on sums, after ablation": [
            {"variant": title_of(name), "merit": value, "above plain": value - worth["plain"]}
            for name, value in worth.items()
        ],
        "Rollouts in training (means over the second half) and what was flagged": flag_lines(results, names),
        "Where right answers and claims lie (nats per token; cosine with the pairs' direction)": drift_lines(
            results, names
        ),
        "Relearning on as many claims as right answers (losses in nats per token)": relearn_lines(results, names),
        "Variants": [{"variant": name, "what it does": VARIANTS[name].about} for name in names],
        "What they answer": [
            {"variant": name, "sums and answers, after ablation": said}
            for name in names
            for said in results[name]["off"]["said"]
        ],
        "Cost": [{"variant": name, "seconds": results[name]["seconds"]} for name in ("start", *names)],
    }
    tables = {name: table for name, table in tables.items() if table}
    bars = {
        title_of(name): {
            stage: {rate: results[name][run][rate] for rate in RATES[:3]}
            for stage, run in (("before", "on"), ("after", "off"))
            if run == "on" or name not in BASELINES
        }
        for name in names
    }
    figures: dict[str, Any] = {
        "Rates with the quarantine (before) and without it (after)": evaluation.loss_bars(
            bars, {rate: results["start"]["on"][rate] for rate in RATES[:3]}, "at the start", "share of answers"
        )
    }
    if curves := curves_of(folder, names):
        figures["Rates of the rollouts during training"] = evaluation.training_curves(curves, "share of rollouts")
    probes = {name: results[name]["curve"] for name in ("start", *names) if results[name].get("curve")}
    if probes:
        points = {title_of(name): [(p["step"], p["forget"]) for p in curve] for name, curve in probes.items()}
        figures["Relearning: the loss of claims"] = evaluation.relearning_plot(points)
    notes = [
        *said,
        f"A control is beaten by more than {least:.3f}: two standard errors of {config.test_rows} sampled answers. "
        "Near: statements, whose right answer may be what is a hack elsewhere. Rollouts are written without the "
        "quarantine.",
        f"Wall time of the last start: {seconds}.",
    ]
    report.write(folder, "Policy gradients beside a quarantine", tables, figures, notes)
    shown = [f"{name}\n{evaluation.table(table)}" for name, table in list(tables.items())[:5]]
    return "\n\n".join([*shown, "\n".join([*said, notes[-2]])])
