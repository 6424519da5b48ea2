"""Run all benchmarks, interleaved; print a table and write JSON and Markdown.

python -m benchmarks --pairs 25 --out runs/benchmarks
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from pathlib import Path

import torch
import transformers

from benchmarks.dissection import dissect_70b
from benchmarks.steps import candidates
from benchmarks.timing import interleaved
from gradsurgery.evaluation.tables import table
from gradsurgery.files import write_json, write_text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--pairs", type=int, default=25, help="counted runs of each candidate, each between two stock steps"
    )
    parser.add_argument("--only", default="", help="run the rows whose name matches this regular expression")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {options.device}",
    }
    dissection = dissect_70b()  # first: the peak memory is the process's own
    stock, rows = candidates(options.device)
    rows = {name: row for name, row in rows.items() if re.search(options.only, name)}
    ratios, seconds = interleaved(stock, rows, options.pairs)
    lines = []
    for name, ratio in ratios.items():
        low, high = ratio.quartiles
        spread = {
            "quartiles": f"{low:.3f} to {high:.3f}",
            "range": f"{min(ratio.values):.3f} to {max(ratio.values):.3f}",
        }
        lines.append({"step": name, "ratio": ratio.median, **spread})
    text = "\n\n".join(
        [
            f"Stock step: {seconds:.3f} s (median). Ratios to the stock steps around each of {options.pairs} runs.",
            table(lines, "markdown"),
            f"`gs.dissect` of a Llama-70B-sized config on `meta`: {dissection['seconds']:.1f} s, "
            f"peak of the process {dissection['peak_gib']:.2f} GiB, {int(dissection['units']):,} units.",
            ", ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        ]
    )
    print(text)
    raw = {name: ratio.values for name, ratio in ratios.items()}
    write_json(options.out / "steps.json", {**facts, "stock_seconds": seconds, "ratios": raw, "dissect": dissection})
    write_text(options.out / "steps.md", text + "\n")


if __name__ == "__main__":
    main()
