"""Policy gradients beside a quarantine: a reward with a loophole, and a weak detector of those who use it.

A small policy learns to answer sums from a mediocre pupil, and is then trained by GRPO against an examiner who also
pays for answers that merely claim to be right. Plain training ends in claims. Each variant routes what it takes for
hacks into a quarantine, which is thrown away: by an incomplete detector's flags, by scores along a direction, or (the
controls) by chance. What is solved, and what is hacked, with the quarantine, without it, and after relearning?

    python recipes/quarantine_grpo.py
    python recipes/quarantine_grpo.py --smoke true
    python recipes/quarantine_grpo.py --detector.recall 0.25 --policy.teacher 0.1
    python recipes/quarantine_grpo.py --config recipes/configs/quarantine_grpo/qwen2.5_0.5b.yaml

Needs TRL (``pip install 'gradsurgery[trl]'``). Resumes at the variant that an interruption met.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from gradsurgery.errors import PlanError
from gradsurgery.runs import RunFolder, deciding, digest, ending_in_a_sentence, quarantine_grpo_run, report
from gradsurgery.runs.quarantine_grpo import GrpoConfig, check
from gradsurgery.runs.quarantine_grpo_report import write_report
from gradsurgery.runs.quarantine_grpo_rows import PolicyRows
from gradsurgery.runs.quarantine_grpo_task import Task

Config = GrpoConfig


def toy(config: Config) -> Config:
    """The same run at the size of a smoke test."""
    small: dict[str, Any] = {"steps": 4, "prompts": 4, "generations": 4, "log_every": 2}
    return dataclasses.replace(
        config,
        start=dataclasses.replace(config.start, steps=20, rows=16),
        policy=dataclasses.replace(config.policy, **small),
        score=dataclasses.replace(config.score, pairs=4),
        relearn=dataclasses.replace(config.relearn, steps=2, every=1, rows=4),
        test_rows=16,
    )


def main(config: Config) -> RunFolder:
    """Train the start, then every variant; evaluate, report."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PlanError("quarantine_grpo.py runs as one process; its models are small.")
    check(config)
    config = toy(config) if config.smoke else config
    started = time.perf_counter()
    stored = deciding(config, ["variants"])  # more of them may be added later
    name = config.name or f"{'smoke-' * config.smoke}seed{config.seed}-{digest(stored)}"
    folder = RunFolder(f"{config.out}/{name}", stored, config.overwrite)
    rows = PolicyRows(config, Task(config.task, config.seed), quarantine_grpo_run.load_tokenizer(config))
    where = quarantine_grpo_run.make_start(config, folder, rows)
    for variant in config.variants:
        quarantine_grpo_run.run_variant(variant, where, config, folder, rows)
    text = write_report(config, folder, report.since(started))
    print(f"\n{text}\n\n{folder.path}/report.html ({report.since(started)})")
    return folder


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        main(jsonargparse.auto_cli(Config, as_positional=False))
