"""Run all benchmarks, interleaved; print tables and write JSON and Markdown.

python -m benchmarks --pairs 25 --out runs/benchmarks
python -m benchmarks --sections keys --threads 1
python -m benchmarks --sections columns --models 34m 254m --compile both
python -m benchmarks --sections scaling --page docs/scaling.md
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import columns, growth, keys, projection, quarantine, rotation, scaling
from benchmarks.dissection import dissect_70b
from benchmarks.memory import allocated, peak
from benchmarks.models import CONFIGS, Setting
from benchmarks.steps import candidates
from benchmarks.timing import interleaved
from gradsurgery.evaluation.tables import table
from gradsurgery.files import write_json, write_text

SECTIONS = ("steps", "keys", "rotation", "projection", "quarantine", "columns", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--pairs", type=int, default=25, help="counted runs of each candidate, each between two of the baseline"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure")
    parser.add_argument("--only", default="", help="run the rows whose name matches this regular expression")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=sorted(CONFIGS), default=["34m"], help="of columns")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="off", help="of columns")
    parser.add_argument("--batch", type=int, default=0, help="rows of columns (0: 4 on a CPU, what fits elsewhere)")
    parser.add_argument("--tokens", type=int, default=0, help="of a row of columns (0: the model's)")
    parser.add_argument("--page", type=Path, help="scaling writes its tables between the markers of this page")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {options.device}",
    }
    measured: dict[str, Any] = dict(facts)
    texts = []
    for section in options.sections:
        text, raw = MEASURES[section](options)
        texts.append(text)
        measured[section] = raw
    text = "\n\n".join([*texts, ", ".join(f"{name} {value}" for name, value in facts.items()) + "."])
    print(text)
    write_json(options.out / "benchmarks.json", measured)
    write_text(options.out / "benchmarks.md", text + "\n")


def measure_steps(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """SGTM and freeze against the stock step; dissecting a large model."""
    dissection = dissect_70b()  # first: the peak memory is the process's own
    stock, rows = candidates(options.device)
    text, raw = compare("Stock step", "step", stock, rows, options)
    large = (
        f"`gs.dissect` of a Llama-70B-sized config on `meta`: {dissection['seconds']:.1f} s, "
        f"peak of the process {dissection['peak_gib']:.2f} GiB, {int(dissection['units']):,} units."
    )
    return f"{text}\n\n{large}", {**raw, "dissect": dissection}


def measure_keys(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Keys against a plain copy of the bytes they touch, tiered steps against the stock step, and memory."""
    plain, swaps, fact = keys.swaps(options.device)
    swapped, raw_swaps = compare(f"Two copies of {fact}", "apply and take back", plain, swaps, options)
    stock, rows = keys.steps(options.device)
    stepped, raw_steps = compare("Stock step", "step", stock, rows, options)
    names = [name for name in keys.METHODS if re.search(options.only, name)]
    peaks = {name: peak(name, options.device) for name in names}
    base = (peaks.get("stock against itself") or peak("stock against itself", options.device)) if peaks else 0
    lines = [{"step": n, "peak GiB": b / 2**30, "of stock": b / base} for n, b in peaks.items()]
    raw = {"swaps": raw_swaps, "steps": raw_steps, "peak_bytes": peaks}
    return "\n\n".join(filter(None, [swapped, stepped, table(lines, "markdown")])), raw


def measure_rotation(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Rotated updates against plain finetuning at 1k and 4k tokens a step, with their memory; making the bases."""
    texts, raw = [], {}
    for tokens in rotation.SIZES:
        names = [name for name, c in rotation.METHODS.items() if c.tokens == tokens and re.search(options.only, name)]
        if not names:
            continue
        stock = rotation.step(options.device, rotation.Candidate(tokens, "stock"))
        for name in names:  # one at a time: each has a model and an optimizer
            row = {name: rotation.step(options.device, rotation.METHODS[name])}
            text, raw[name] = compare(f"Stock step of {tokens} tokens", "step", stock, row, options)
            texts.append(text)
        peaks = {name: peak(name, options.device, "benchmarks.rotation") for name in names}
        itself = f"stock against itself, {tokens} tokens"
        base = peaks.get(itself) or peak(itself, options.device, "benchmarks.rotation")
        lines = [{"step": n, "peak GiB": b / 2**30, "of stock": b / base} for n, b in peaks.items()]
        texts.append(table(lines, "markdown"))
        raw[f"peak_bytes, {tokens} tokens"] = peaks
    forward, rows = rotation.covariances(options.device)
    text, raw["covariances"] = compare("Forward pass of 4096 tokens", "pass", forward, rows, options)
    raw["eigh"] = seconds = rotation.eigenbases(options.device)
    fact = f"Eigenvectors of all layers of a 135M model: {seconds['all']:.1f} s."
    return "\n\n".join(filter(None, [*texts, text, fact])), raw


def measure_projection(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Opposed projection, by hand, and through TorchJD, against the stock forward and backward, with their memory."""
    candidates = projection.available()
    names = [name for name in candidates if re.search(options.only, name)]
    baseline = projection.step(options.device, projection.stock)
    base = allocated(baseline)
    texts: list[str] = []
    raw: dict[str, Any] = {}
    lines = [{"step": "stock", "peak MB": base / 1e6, "above stock, gradients": 0.0}]
    for name in names:  # one at a time: each has two models
        row = projection.step(options.device, candidates[name])
        raw[f"{name}, bytes"] = held = allocated(row)
        above = (held - base) / projection.gradient_bytes()
        lines.append({"step": name, "peak MB": held / 1e6, "above stock, gradients": above})
        text, raw[name] = compare("Stock forward and backward", "step", baseline, {name: row}, options)
        texts.append(text)
    if missing := sorted(projection.METHODS.keys() - candidates.keys()):
        texts.append(f"Not measured, since TorchJD or an extra of it is missing: {', '.join(missing)}.")
    return "\n\n".join([*texts, "Besides models and batch:", table(lines, "markdown")]), raw


def measure_quarantine(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Steps of an adapter with a quarantine against the same adapter's without routing."""
    baseline, rows = quarantine.candidates(options.device)
    return compare("Step of the adapter without routing", "step", baseline, rows, options)


def measure_columns(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Every method on every model that is asked for, eager and compiled."""
    compiled = {"off": (False,), "on": (True,), "both": (False, True)}[options.compile]
    shape = (options.batch, options.tokens)
    settings = [Setting.of(model, options.device, how, *shape) for model in options.models for how in compiled]
    return columns.measure(settings, options.pairs, options.only)


def measure_scaling(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """How costs grow, and what they are for 8B and 70B on 8 and 64 cards."""
    texts, raw = scaling.measure(growth.Size(pairs=options.pairs), options.device, options.only)
    if options.page is not None:
        scaling.write(options.page, texts)
    return "\n".join(f"## {name.capitalize()}\n\n{text}" for name, text in texts.items()), raw


MEASURES: dict[str, Callable[[argparse.Namespace], tuple[str, dict[str, Any]]]] = {
    "steps": measure_steps,
    "keys": measure_keys,
    "rotation": measure_rotation,
    "projection": measure_projection,
    "quarantine": measure_quarantine,
    "columns": measure_columns,
    "scaling": measure_scaling,
}


def compare(
    what: str,
    column: str,
    baseline: Callable[[], None],
    rows: Mapping[str, Callable[[], None]],
    options: argparse.Namespace,
) -> tuple[str, dict[str, Any]]:
    """Time rows against a baseline: a Markdown table, and the ratios."""
    rows = {name: row for name, row in rows.items() if re.search(options.only, name)}
    if not rows:
        return "", {}
    ratios, seconds = interleaved(baseline, rows, options.pairs)
    lines = []
    for name, ratio in ratios.items():
        low, high = ratio.quartiles
        spread = {
            "quartiles": f"{low:.3f} to {high:.3f}",
            "range": f"{min(ratio.values):.3f} to {max(ratio.values):.3f}",
        }
        lines.append({column: name, "ratio": ratio.median, **spread})
    taken = f"{seconds:.3f} s" if seconds > 0.1 else f"{1e3 * seconds:.2f} ms"
    head = f"{what}: {taken} (median). Ratios to those around each of {options.pairs} runs."
    raw = {"seconds": seconds, "ratios": {name: ratio.values for name, ratio in ratios.items()}}
    return f"{head}\n\n{table(lines, 'markdown')}", raw


if __name__ == "__main__":
    main()
