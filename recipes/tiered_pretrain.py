"""Pretrain two tiers in one set of weights: C1, the model as released, and C2, the same weights under a secret key.

Every batch is learned in both configurations; keyed entries learn from C2 alone, public ones from the mean of both
(El Feghali et al. 2026, arXiv 2606.21638). Without ``--key`` a key is drawn and kept in ``keys/``, outside of the run's
folder, which never holds more of it than its fingerprint.

    python recipes/tiered_pretrain.py
    python recipes/tiered_pretrain.py --every 10 --draw.fraction 0.1 --draw.count 2
    torchrun --nproc-per-node 8 recipes/tiered_pretrain.py --config recipes/configs/tiered/64m.yaml
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

import gradsurgery as gs
from gradsurgery import evaluation
from gradsurgery.errors import PlanError
from gradsurgery.runs import RunFolder, deciding, digest, ending_in_a_sentence, keys, pretrain, report, tiers, train


@dataclass
class TiersConfig:
    """Options of ``gs.methods.tiered``.

    Args:
        every: Keyed passes run in every this many steps.
        tiers: With several keys: all of them run in a step, or one.
        cumulative: Tier C3 runs under the keys of C2 and C3, and so on.
        public_weights: Factor of each tier's gradient on public entries, C1 first; by default their mean.
        keyed_weights: Factor of each keyed tier's gradient on the entries it trains.
        step_in: Configuration that the optimizer steps in.
    """

    every: int = 1
    tiers: Literal["all", "sampled", "round_robin"] = "all"
    cumulative: bool = False
    public_weights: list[float] | None = None
    keyed_weights: list[float] | None = None
    step_in: Literal["C1", "C2"] = "C1"


@dataclass
class Config(pretrain.PretrainConfig):
    """The whole run; see ``PretrainConfig``.

    Args:
        key: Key file, or a list of them, for tiers C2, C3, …; without one, keys are drawn.
        key_seed: Draw them from this number, which makes them guessable, instead of the system's entropy.
        key_folder: Where drawn keys are kept, owner-only and ignored by git.
        draw: How keys are drawn.
        method: What is trained.
    """

    key: str | list[str] | None = None
    key_seed: int | None = None
    key_folder: str = "keys"
    draw: keys.DrawConfig = field(default_factory=keys.DrawConfig)
    method: TiersConfig = field(default_factory=TiersConfig)
    out: str = "runs/tiered_pretrain"


@dataclass
class Pretrained:
    """What a run leaves behind: a stock checkpoint in C1, and its keys elsewhere."""

    folder: RunFolder
    model: Path
    keys: list[Path]


SECRET = ("key", "key_seed", "key_folder")


def run_name(config: Config, fingerprints: list[str] | None) -> str:
    """Runs of one configuration and key share a name; the seed of a key is as good as the key, and is no part of it."""
    return config.name or f"seed{config.seed}-{digest(deciding(config, SECRET), fingerprints)}"


def open_run(config: Config, anatomy: gs.Anatomy) -> tuple[RunFolder, list[gs.PermutationKey], list[Path]]:
    """The run's folder, its keys, and their files."""
    given = [config.key] if isinstance(config.key, str) else config.key
    if given and config.key_seed is not None:
        raise PlanError("key and key_seed are given both: a key is read from its file, or drawn.")
    found = keys.load_keys(given) if given else None
    if found is None and config.key_seed is not None:
        found = keys.draw_keys(config.draw, anatomy, config.key_seed)
    name = run_name(config, [key.fingerprint for key in found] if found is not None else None)
    paths = [Path(path) for path in given or keys.key_paths(config.key_folder, name, config.draw.count)]
    with keys.first_rank_first():
        if not given:
            run = Path(config.out, name)
            found = keys.kept_keys(config.draw, anatomy, config.key_seed, paths, run, config.overwrite)
        assert found is not None
        stored = {**deciding(config, SECRET), "keys": [key.fingerprint for key in found]}
        folder = RunFolder(f"{config.out}/{name}", stored, config.overwrite, main=keys.main_rank())
    return folder, found, paths


def build_method(config: Config, found: list[gs.PermutationKey], anatomy: gs.Anatomy) -> gs.Method:
    options = config.method
    return gs.methods.tiered(
        found,
        anatomy,
        every=options.every,
        tiers=options.tiers,
        cumulative=options.cumulative,
        public_weights=options.public_weights,
        keyed_weights=options.keyed_weights,
        step_in=options.step_in,
        seed=config.seed,
    )


def tier_keys(found: list[gs.PermutationKey], cumulative: bool) -> dict[str, gs.PermutationKey | None]:
    """What each tier runs under; C1 under none."""
    out: dict[str, gs.PermutationKey | None] = {"C1": None}
    for k, key in enumerate(found):
        out[f"C{k + 2}"] = gs.PermutationKey.compose(*found[: k + 1]) if cumulative else key
    return out


def run_model(
    config: Config, folder: RunFolder, found: list[gs.PermutationKey], loaded: Any, model: PreTrainedModel
) -> None:
    """Train, evaluate every tier, save in C1; skipped where the run has it."""
    if "tiered" in folder.results():
        return
    anatomy = gs.dissect(model)
    method, by_tier = build_method(config, found, anatomy), tier_keys(found, config.method.cumulative)
    if folder.main:
        print(f"\ntiered: {model.num_parameters():,} parameters\n{method.explain(model)}")
    score = tiers.tier_scorer(by_tier, anatomy, loaded.sample(config.train))
    steps = loaded.steps(config)
    figures = train("tiered", model, method, steps, folder, config.train, config.seed, score, config.resume_from)
    if not folder.main:
        return
    scores = tiers.score_holders(model, {t: [key] for t, key in by_tier.items()}, anatomy, loaded.held_back)
    pretrain.save(model, loaded.tokenizer, folder, "tiered")
    about = [{"fingerprint": k.fingerprint, "share of the model": k.region(anatomy).fraction} for k in found]
    folder.store("tiered", {**figures, "method": method.describe(), "keys": about, "scores": scores})


def main(config: Config) -> Pretrained:
    started = time.perf_counter()
    loaded = pretrain.load(config)
    model = pretrain.starting_model(config, loaded.tokenizer)
    folder, found, paths = open_run(config, gs.dissect(model))
    run_model(config, folder, found, loaded, model)
    if folder.main:
        result = folder.results()["tiered"]
        lines = report.score_lines(result["scores"])
        report.write(
            folder,
            "Pretraining tiers in one set of weights",
            {"Held-back scores (nats per token, share of tokens)": lines, "Cost": [report.cost_line(result)]},
            {"Held-back loss of each tier": report.score_bars(result["scores"])},
            [f"Keys: {', '.join(str(key) for key in found)}. Wall time of the last start: {report.since(started)}."],
        )
        print(f"\n{evaluation.table(lines)}\n\n{folder.path}/report.html ({report.since(started)})")
        print(f"key of this run: {', '.join(map(str, paths))}")
    return Pretrained(folder, folder / "models/tiered", paths)


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        main(jsonargparse.auto_cli(Config, as_positional=False))
