"""Learn a text, and keep another out: supervised training of an adapter with a quarantine, and its controls.

A small model trains on English (retain) and Spanish (forget), which a detector of given recall flags. What flagged rows
teach goes into a part of the adapter that is thrown away; how much of the rest still learned Spanish? Every variant,
by label and by score, stands beside the same adapter without routing, a filter that leaves out what is flagged, and
controls: a random direction, shuffled labels, placebo pairs.

    python recipes/quarantine_sft.py
    python recipes/quarantine_sft.py --labels.recall 0.25 --labels.fpr 0.05
    python recipes/quarantine_sft.py --text.kind topics
    python recipes/quarantine_sft.py --config recipes/configs/quarantine_sft/smollm2_1b7.yaml
"""

from __future__ import annotations

import time

from gradsurgery.runs import RunFolder, ending_in_a_sentence, keys, report
from gradsurgery.runs.quarantine_sft import QuarantineSftConfig, require, toy
from gradsurgery.runs.quarantine_sft_report import write_report
from gradsurgery.runs.quarantine_sft_rows import load_data
from gradsurgery.runs.quarantine_sft_run import measure_start, run_variant
from gradsurgery.runs.quarantine_sft_start import train_base
from gradsurgery.runs.setup import deciding, digest

Config = QuarantineSftConfig


def main(config: Config) -> RunFolder:
    """Train every variant from one model, measure, report; what the run's folder has is not done again."""
    started = time.perf_counter()
    require(config.variants)
    config = toy(config) if config.smoke else config
    stored = deciding(config, ["variants"])  # more of them may be added later
    name = config.name or f"{config.text.kind}-seed{config.seed}-recall{config.labels.recall:g}-{digest(stored)}"
    loaded = load_data(config)
    folder = RunFolder(f"{config.out}/{name}", stored, config.overwrite, main=keys.main_rank())
    where = train_base(config, loaded)
    for variant in sorted(config.variants, key=lambda name: name != "plain"):  # what the others are compared with
        run_variant(variant, where, config, folder, loaded)
    measure_start(where, config, folder, loaded)
    if folder.main:
        shown = write_report(config, folder, report.since(started))
        print(f"\n{shown}\n\n{folder.path}/report.html ({report.since(started)})")
    return folder


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        main(jsonargparse.auto_cli(Config, as_positional=False))
