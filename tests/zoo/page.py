"""The results of a sweep as a page: one row an architecture."""

from __future__ import annotations

import platform
from collections import Counter
from typing import Any

TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Sequence to sequence",
    "masked": "Masked language models",
    "image": "Image classification",
}
NOTES = {"norm": "", "bias": "", "output bias": "", "embedding": "", "outside the blocks": ""}
"""Reasons that every model has, and that say nothing about its layout."""
HEAD = """# Architectures

Every architecture of four mappings of transformers {transformers}, built tiny from its config with random weights,
biases and norms, taken apart and checked by what the model itself computes: swaps and permutations inside an exchange
class keep the output, consumers swapped alone change it, so do swaps across classes and layers; zeroing a
closed unit's consumers hides everything else about it; swapping twice restores every bit; units are disjoint; no live
matrix is left out silently. Written by `python -m tests.zoo.sweep --page docs/architectures.md` (torch {torch},
{machine}, shape {seed} of three, {jobs} processes at a time); engine and zoo were developed together, so this is no
held-out estimate.

*units* counts all layers; an asterisk marks kinds whose units are not all exchangeable (relative positions, slopes,
router groups, norms over groups), a circle kinds that a norm over several units couples (ablating differs from
pruning). *left out* names what belongs to no unit, besides embeddings, norms, biases and what lies outside the blocks.

| mapping | architectures | right | wrong | refused | not built | median s | worst s |
|---|---|---|---|---|---|---|---|
"""


def page_of(results: dict[str, dict[str, Any]], seed: int, jobs: int) -> str:
    """Markdown of one sweep: a summary, then a table a mapping."""
    import torch
    import transformers

    machine = f"{platform.machine()}, two cores"
    text = HEAD.format(
        transformers=transformers.__version__, torch=torch.__version__, machine=machine, seed=seed, jobs=jobs
    )
    for mapping in TITLES:
        rows = [r for name, r in results.items() if name.startswith(f"{mapping}/")]
        if rows:
            counts = Counter(_status(r) for r in rows)
            seconds = sorted(r["seconds"] for r in rows if "seconds" in r) or [0.0]
            cells = [mapping, len(rows), *(counts[s] for s in ("right", "wrong", "refused", "not built"))]
            text += "| " + " | ".join(map(str, cells)) + f" | {seconds[len(seconds) // 2]:.2f} | {seconds[-1]:.1f} |\n"
    for mapping, title in TITLES.items():
        named = {name: r for name, r in results.items() if name.startswith(f"{mapping}/")}
        if named:
            text += f"\n## {title}\n\n| architecture | result | units | seconds | left out |\n|---|---|---|---|---|\n"
            text += "".join(_row(name.partition("/")[2], r) for name, r in named.items())
    return text


def _status(result: dict[str, Any]) -> str:
    return result["status"] if result["status"] in ("right", "wrong", "not built") else "refused"


def _row(name: str, result: dict[str, Any]) -> str:
    units = ", ".join(
        f"{kind} {n['units']:,}{'*' if n['exchangeable'] < n['units'] else ''}{'°' if n['open'] else ''}"
        for kind, n in result.get("units", {}).items()
    )
    seconds = f"{result['seconds']:.2f}" if "seconds" in result else ""
    if result["status"] == "right":
        counts = Counter(why for why in result["structural"].values() if why not in NOTES)
        why = ", ".join(f"{reason} {n}" for reason, n in counts.most_common())
    else:
        why = " ".join(result["why"].split())[:180].replace("|", "/")
    return f"| {name} | {_status(result)} | {units} | {seconds} | {why} |\n"
