"""Remove a language: SGTM on English and Spanish text, against plain training and a data filter.

Three models see the same batches. ``plain`` trains on everything, ``data_filter`` leaves out the rows that are labelled
forget, ``sgtm`` trains dedicated heads and neurons on them, which are removed afterwards (arXiv 2512.05648, section 4).

    python recipes/sgtm_bilingual.py
    python recipes/sgtm_bilingual.py --seed 1 --labels.undiscovered 0.1
    torchrun --nproc-per-node 2 recipes/sgtm_bilingual.py --config recipes/configs/sgtm_bilingual/tinystories_64m.yaml
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

import gradsurgery as gs
from gradsurgery import data, evaluation, runs
from gradsurgery.errors import GradsurgeryError
from gradsurgery.runs import ModelConfig, OrderedRows, RunFolder, TrainConfig, build_tokenizer, deciding, digest, train


@dataclass
class TextConfig:
    """How the text is read.

    Args:
        tokenizer: "embedded", "train:SIZE" (on the training part), or a name or folder for AutoTokenizer.
        forget: Category to be removed.
        adjacent: Categories close to it, if any.
        validation: Share of the documents held back.
        limit: Documents a category, for a quick look.
        test_rows: Sequences a category in the final evaluation.
    """

    tokenizer: str = "embedded"
    forget: str = "es"
    adjacent: list[str] = field(default_factory=list)
    validation: float = 0.05
    limit: int | None = None
    test_rows: int = 400


@dataclass
class LabelConfig:
    """Which documents carry a label: undiscovered forget documents carry none and train everything.

    Args:
        undiscovered: Share of the forget documents without their label.
        retain: Share of the retain documents that are labelled retain.
        adjacent: Share of the adjacent documents that are labelled retain.
        precision: Precision of the forget label.
    """

    undiscovered: float = 0.0
    retain: float = 1.0
    adjacent: float = 0.0
    precision: float = 1.0


@dataclass
class SgtmConfig:
    """Options of ``gs.methods.sgtm`` and ``gs.methods.forget_units``."""

    heads: int = 1
    neurons: int = 128
    percent: float | None = None
    layers: list[int] | None = None
    strategy: Literal["mask", "detach", "zero"] = "mask"
    embeddings: Literal["joint", "retain"] = "joint"
    norms: Literal["joint", "retain"] = "joint"
    joint: list[str] = field(default_factory=list)


@dataclass
class Config:
    """The whole run.

    Args:
        data: "embedded", "hub:owner/name" (such as hub:ffuuugor/tinystories-spanish), or a local file or folder.
        rows: Sequences of each category in a batch, or the size of a batch whose mix follows the data.
        models: Which models to train.
        out: Folder of all runs.
        name: Name of this run; by default made from its configuration, so that the same command resumes.
        overwrite: Delete a run of this name first.
    """

    data: str = "embedded"
    text: TextConfig = field(default_factory=TextConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sgtm: SgtmConfig = field(default_factory=SgtmConfig)
    rows: dict[str, int] | int = field(default_factory=lambda: {"en": 4, "es": 4})
    models: list[str] = field(default_factory=lambda: ["plain", "sgtm", "data_filter"])
    seed: int = 0
    out: str = "runs/sgtm_bilingual"
    name: str | None = None
    overwrite: bool = False


def run_name(config: Config) -> str:
    return config.name or f"seed{config.seed}-undiscovered{config.labels.undiscovered:g}-{digest(deciding(config))}"


def load_data(config: Config) -> tuple[Any, data.Rows, dict[str, torch.Tensor]]:
    """Tokenizer, labelled training rows, held-back sequences by category."""
    corpus = data.load_bilingual(config.data, validation=config.text.validation, limit=config.text.limit)
    tokenizer = build_tokenizer(config.text.tokenizer, corpus)
    shape = {"context": config.model.context, "end_of_text": tokenizer.eos_token_id}
    rows = data.build_rows(
        data.tokenize(corpus, tokenizer),
        **shape,
        forget=config.text.forget,
        adjacent=config.text.adjacent,
        noise=data.Noise(recall=1 - config.labels.undiscovered, precision=config.labels.precision),
        retain_retain=config.labels.retain,
        adjacent_retain=config.labels.adjacent,
        seed=config.seed,
    )
    held_back = data.pack_categories(data.tokenize(corpus, tokenizer, "validation"), **shape)
    return tokenizer, rows, {name: ids[: config.text.test_rows] for name, ids in held_back.items()}


def build_model(config: Config, tokenizer: Any) -> PreTrainedModel:
    """A model with fresh weights, the same for every method of one seed."""
    return runs.build_model(config.model, tokenizer, config.seed)


def build_method(name: str, config: Config, model: PreTrainedModel) -> tuple[gs.Method, gs.Units | None]:
    """The method of one of the models, and the units it removes afterwards."""
    if name == "plain":
        return gs.methods.plain(), None
    if name == "data_filter":
        return gs.methods.data_filter(), None
    if name != "sgtm":
        raise gs.errors.PlanError(f"models are plain, sgtm and data_filter, not {name!r}.")
    anatomy, options = gs.dissect(model), config.sgtm
    numbers: dict[str, Any] = {"heads": options.heads, "neurons": options.neurons}
    if options.percent is not None:
        numbers = {"percent": options.percent}
    forget = gs.methods.forget_units(anatomy, **numbers, layers=options.layers)
    chosen = {key: getattr(options, key) for key in ("strategy", "embeddings", "norms", "joint")}
    return gs.methods.sgtm(anatomy, forget, **chosen), forget


def losses_of(model: PreTrainedModel, held_back: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: score["loss"] for name, score in evaluation.evaluate(model, held_back).items()}


def run_model(
    name: str, config: Config, folder: RunFolder, loaded: tuple[Any, data.Rows, dict[str, torch.Tensor]]
) -> None:
    """Train, evaluate, remove, evaluate again, save; skipped where the run has it."""
    if name in folder.results():
        return
    tokenizer, rows, held_back = loaded
    model = build_model(config, tokenizer)
    method, forget = build_method(name, config, model)
    if folder.main:
        print(f"\n{name}: {model.num_parameters():,} parameters\n{method.explain(model)}")
    sampler = data.MixedSampler(rows, config.rows, seed=config.seed)
    sample = {category: ids[: config.train.eval_rows] for category, ids in held_back.items()}
    steps = OrderedRows(rows, sampler, config.train.steps)
    figures = train(name, model, method, steps, folder, config.train, config.seed, lambda m: losses_of(m, sample))
    if not folder.main:
        return
    result: dict[str, Any] = {**figures, "method": method.describe(), "before": losses_of(model, held_back)}
    save(model, tokenizer, folder, name)
    if forget is not None:
        result["grad_norms"] = gradient_norms(model, forget, held_back)
        gs.ablate_(model, forget)
        result["after"] = losses_of(model, held_back)
        save(model, tokenizer, folder, f"{name}_removed")
    folder.store(name, result)


def save(model: PreTrainedModel, tokenizer: Any, folder: RunFolder, name: str) -> None:
    with folder.whole_folder(f"models/{name}") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def gradient_norms(model: PreTrainedModel, forget: gs.Units, held_back: dict[str, torch.Tensor]) -> Any:
    rest = forget.anatomy.rest(forget)
    groups = {
        kind: {n: e.mask() for n, e in region.entries.items()} for kind, region in (("forget", forget), ("other", rest))
    }
    batches = {
        name: [{"input_ids": ids[i : i + 1].long()} for i in range(min(16, len(ids)))]
        for name, ids in held_back.items()
    }
    return evaluation.relative_grad_norms(model, groups, batches)


def report(config: Config, folder: RunFolder, rows: data.Rows, seconds: float) -> str:
    """The result table, printed and written with its plots."""
    results, runs, lines = folder.results(), {}, []
    for name in config.models:
        result = results[name]
        runs[name] = {stage: result[stage] for stage in ("before", "after") if stage in result}
        for stage in runs[name]:
            label = name if "after" not in result else f"{name}, {stage} removal"
            lines.append({"model": label, **{f"{c} loss": loss for c, loss in result[stage].items()}})
            lines[-1] |= {"tokens/s": int(result["tokens_per_second"]), "training FLOPs": result["flops"]}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in folder.metrics:
        for key, value in line.items():
            if key.startswith("eval/"):
                curves.setdefault(line["model"], {}).setdefault(key[5:], []).append((line["step"], value))
    reference = results.get("data_filter", {}).get("before")
    figures = {"Held-back loss of each model, before and after removal": evaluation.loss_bars(runs, reference)}
    if curves:
        figures["Held-back loss during training (a sample)"] = evaluation.training_curves(curves)
    if norms := results.get("sgtm", {}).get("grad_norms"):
        figures["Relative gradient norms of forget and other units, before removal"] = evaluation.grad_norm_plot(norms)
    for file, figure in zip(("losses", "curves", "grad_norms"), figures.values(), strict=False):
        (folder / "plots").mkdir(exist_ok=True)
        figure.savefig(folder / "plots" / f"{file}.png")
    evaluation.write_report(
        folder / "report.html",
        title="Removing a language with selective gradient masking",
        config=folder.config,
        results={"Losses (nats per token, held back)": lines, "Training rows": rows.summary()},
        figures=figures,
        notes=[f"Forget category: {config.text.forget}. Wall time of the last start: {seconds:.0f} s."],
    )
    return evaluation.table(lines)


def main(config: Config) -> None:
    started = time.perf_counter()
    rank = int(os.environ.get("RANK", "0"))
    folder = RunFolder(f"{config.out}/{run_name(config)}", deciding(config), config.overwrite, main=rank == 0)
    loaded = load_data(config)
    for name in config.models:
        run_model(name, config, folder, loaded)
    if rank == 0:
        table = report(config, folder, loaded[1], time.perf_counter() - started)
        print(f"\n{table}\n\n{folder.path}/report.html ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    import jsonargparse

    try:
        main(jsonargparse.auto_cli(Config, as_positional=False))
    except GradsurgeryError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to resume.")
