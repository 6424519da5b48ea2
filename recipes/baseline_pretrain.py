"""Pretrain without tiers: the same model, text and schedule as ``tiered_pretrain.py``, one pass a step.

python recipes/baseline_pretrain.py
torchrun --nproc-per-node 8 recipes/baseline_pretrain.py --config recipes/configs/tiered/64m.yaml
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gradsurgery as gs
from gradsurgery import evaluation
from gradsurgery.runs import RunFolder, deciding, digest, ending_in_a_sentence, keys, pretrain, report, tiers, train


@dataclass
class Config(pretrain.PretrainConfig):
    """The whole run; see ``PretrainConfig``.

    Args:
        draw: For configurations shared with ``tiered_pretrain.py``: a baseline has no key, and says so.
    """

    draw: keys.DrawConfig | None = None
    out: str = "runs/baseline_pretrain"


def main(config: Config) -> RunFolder:
    started = time.perf_counter()
    stored = deciding(config, ["draw"])
    name = config.name or f"seed{config.seed}-{digest(stored)}"
    folder = RunFolder(f"{config.out}/{name}", stored, config.overwrite, main=keys.main_rank())
    if "plain" not in folder.results():
        loaded = pretrain.load(config)
        model = pretrain.starting_model(config, loaded.tokenizer)
        anatomy, method, steps = gs.dissect(model), gs.methods.plain(), loaded.steps(config)
        if folder.main:
            print(f"\nplain: {model.num_parameters():,} parameters\n{method.explain(model)}")
        score = tiers.tier_scorer({"C1": None}, anatomy, loaded.sample(config.train))
        figures = train("plain", model, method, steps, folder, config.train, config.seed, score, config.resume_from)
        if folder.main:
            scores = tiers.score_holders(model, {"C1": [None]}, anatomy, loaded.held_back)
            pretrain.save(model, loaded.tokenizer, folder, "plain")
            folder.store("plain", {**figures, "method": method.describe(), "scores": scores})
    if folder.main:
        if config.draw is not None:
            print("draw: not used, a baseline has no key.")
        result = folder.results()["plain"]
        lines = report.score_lines(result["scores"])
        report.write(
            folder,
            "Pretraining without tiers",
            {"Held-back scores (nats per token, share of tokens)": lines, "Cost": [report.cost_line(result)]},
            {"Held-back loss": report.score_bars(result["scores"])},
            [f"Wall time of the last start: {report.since(started)}."],
        )
        print(f"\n{evaluation.table(lines)}\n\n{folder.path}/report.html ({report.since(started)})")
    return folder


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        main(jsonargparse.auto_cli(Config, as_positional=False))
