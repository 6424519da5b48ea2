"""Run the cells of a sweep and report over seeds: one YAML file names recipe, fixed options, grid and seeds.

    python recipes/sweep.py recipes/configs/sweeps/undiscovered.yaml
    python recipes/sweep.py recipes/configs/sweeps/rates.yaml --processes 2
    python recipes/sweep.py recipes/configs/sweeps/undiscovered.yaml --report      # of what is done so far

The same command goes on where it was stopped; what is done is not done again.
"""

from __future__ import annotations

import argparse

from gradsurgery.runs import ending_in_a_sentence
from gradsurgery.runs.sweep import read_sweep, run_sweep
from gradsurgery.runs.sweep_report import write_sweep_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("sweep", help="the YAML file")
    parser.add_argument("--out", help="folder of the sweep, instead of the file's")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--ranks", type=int, default=1, help="processes of one run, over torchrun")
    parser.add_argument("--report", action="store_true", help="report what is done, run nothing")
    options = parser.parse_args()
    sweep = read_sweep(options.sweep, options.out)
    if not options.report:
        run_sweep(sweep, options.processes, options.ranks, lambda line: print(line, flush=True))
    print(f"\n{write_sweep_report(sweep)}\n\n{sweep.out}/report.html")


if __name__ == "__main__":
    with ending_in_a_sentence("run the same command again to go on."):
        main()
