"""Configuration of a supervised run with a quarantine: what is learned beside what should not be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from gradsurgery.data import Noise
from gradsurgery.data.topics import ADJACENT, FORGET
from gradsurgery.errors import PlanError
from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.pretrain import small_model
from gradsurgery.runs.quarantine_controls import VARIANTS as ROUTED
from gradsurgery.runs.quarantine_controls import Variant, require_variants
from gradsurgery.runs.setup import ModelConfig

FILTER = "data_filter"
"""What routing by labels competes with: the same labels, and their rows left out."""

VARIANTS = {
    "plain": ROUTED["plain"],
    FILTER: Variant("labelled rows are left out; no quarantine is needed"),
    **{name: variant for name, variant in ROUTED.items() if name != "plain"},
}


def require(names: list[str]) -> None:
    """As `quarantine_controls.require_variants`, for the variants of this run."""
    if unknown := [name for name in names if name not in VARIANTS]:
        raise PlanError(f"variants are {', '.join(VARIANTS)}, not {', '.join(unknown)}.")
    require_variants([name for name in names if name != FILTER])


@dataclass
class TextConfig:
    """What is trained on.

    Args:
        kind: "bilingual": the retain language and the forget language; "topics": categories of one language.
        source: "embedded", "hub:owner/name", or a local file or folder.
        tokenizer: "embedded", "train:SIZE" (on the training part), or a name or folder for AutoTokenizer; that of the
            given model, where there is one.
        forget: Category or topics to be kept out.
        retain: "bilingual": the other language.
        adjacent: "topics": those close to the forget topics, which are legitimate.
        near: "bilingual": share of the held-back retain sentences, those with the most words of the forget language,
            that make the legitimate text close to it.
        validation: Share of the documents held back.
        limit: Documents a category, for a quick look.
        test_rows: Sequences a category in the final evaluation.
        context: Tokens of a sequence.
    """

    kind: Literal["bilingual", "topics"] = "bilingual"
    source: str = "embedded"
    tokenizer: str = "embedded"
    forget: list[str] | None = None
    retain: str = "en"
    adjacent: list[str] = field(default_factory=lambda: list(ADJACENT))
    near: float = 0.2
    validation: float = 0.05
    limit: int | None = None
    test_rows: int = 150
    context: int = 64

    @property
    def forgets(self) -> list[str]:
        """The categories to be kept out."""
        return self.forget or (["es"] if self.kind == "bilingual" else list(FORGET))


@dataclass
class LabelConfig:
    """The detector: which documents carry a flag.

    Args:
        recall: Share of the forget documents that it finds (its true positive rate).
        fpr: Share of the other documents that it flags by mistake.
    """

    recall: float = 0.5
    fpr: float = 0.0

    def noise(self) -> Noise:
        return Noise(tpr=self.recall, fpr=self.fpr)


@dataclass
class BaseConfig:
    """The model that is adapted, where none is given: trained from scratch on everything but the forget text.

    Args:
        model: Its architecture; its context is that of the text.
        rows: Sequences of a batch.
        train: How.
    """

    model: ModelConfig = field(default_factory=small_model)
    rows: int = 16
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1000, learning_rate=4e-3, max_grad_norm=1.0, eval_every=0, save_every=200, log_every=25
        )
    )


@dataclass
class AdapterConfig:
    """The adapter, the same for every variant.

    Args:
        modules: Which linear layers.
        kind: "lora" or "svd".
        rank: Of the kept part.
        quarantine_rank: Of the quarantine.
        alpha: Scale of low-rank blocks, by default the rank.
        quarantine_rate: The quarantine's learning rate over the kept part's.
    """

    modules: str | list[str] = "all-linear"
    kind: Literal["lora", "svd"] = "lora"
    rank: int = 16
    quarantine_rank: int = 16
    alpha: float | None = None
    quarantine_rate: float = 0.15


@dataclass
class ScoreConfig:
    """How rows are scored.

    Args:
        pairs: Pairs that the direction comes from.
        quantile: Rows whose score is above this quantile of recent ones are flagged.
        halflife: Rows after which a score weighs half.
        by: What has a score.
    """

    pairs: int = 32
    quantile: float = 0.75
    halflife: float = 96.0
    by: Literal["sequence", "token"] = "sequence"


@dataclass
class RelearnConfig:
    """The probe on what is left: full finetuning on equal parts of both until the forget loss is that of ``plain``.

    Args:
        steps: At most; 0 for no probe.
        every: Steps between its measurements.
        rate: Its learning rate.
        rows: Sequences a step, half of them forget.
        test_rows: Sequences of each kind that it is measured on.
    """

    steps: int = 60
    every: int = 10
    rate: float = 5e-4
    rows: int = 16
    test_rows: int = 32


@dataclass
class QuarantineSftConfig:
    """The whole run.

    Args:
        model: Causal language model (folder or hub name); by default one is trained from scratch first.
        dtype: What its weights are kept in; adapters are fp32.
        text: What is trained on.
        labels: The detector.
        base: The model that is trained first.
        adapter: Adapter.
        score: Scores of rows.
        rows: Sequences of each kind in a batch; "adjacent" is a kind of topics.
        train: How adapters are trained; its learning rate is the kept part's.
        relearn: The probe.
        variants: What is trained, of ``VARIANTS``; the controls belong to it.
        smoke: Run everything at toy size, to see that it runs.
        out: Folder of all runs.
        name: Name of this run; by default made from its configuration, so that the same command resumes.
        overwrite: Delete a run of this name first.
    """

    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    text: TextConfig = field(default_factory=TextConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    rows: dict[str, int] = field(default_factory=lambda: {"retain": 6, "forget": 6})
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=150,
            learning_rate=4e-3,
            weight_decay=0.01,
            max_grad_norm=1.0,
            eval_every=50,
            eval_rows=32,
            save_every=75,
            log_every=5,
        )
    )
    relearn: RelearnConfig = field(default_factory=RelearnConfig)
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    smoke: bool = False
    seed: int = 0
    out: str = "runs/quarantine_sft"
    name: str | None = None
    overwrite: bool = False


def toy(config: QuarantineSftConfig) -> QuarantineSftConfig:
    """The same run at the size of a smoke test."""
    small: dict[str, Any] = {"steps": 6, "eval_every": 3, "eval_rows": 4, "save_every": 2, "log_every": 1}
    base = dataclasses.replace(config.base, train=dataclasses.replace(config.base.train, **{**small, "eval_every": 0}))
    return dataclasses.replace(
        config,
        base=base,
        train=dataclasses.replace(config.train, **small),
        text=dataclasses.replace(config.text, limit=config.text.limit or 200, test_rows=8, validation=0.1),
        score=dataclasses.replace(config.score, pairs=4),
        relearn=dataclasses.replace(config.relearn, steps=min(config.relearn.steps, 4), every=2, test_rows=4, rows=4),
    )
