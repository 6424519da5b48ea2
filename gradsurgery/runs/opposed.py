"""The configuration of a run that lifts refusals by opposed projection, and the variants that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.pretrain import small_model
from gradsurgery.runs.setup import ModelConfig


@dataclass
class ChatConfig:
    """A data set of prompts and responses.

    Args:
        source: "hub:owner/name", or a local file or folder.
        part: The only part of a data set of the hub to read, such as "30k_train".
        prompt, response: Columns.
        where: Column -> value: rows that are taken.
        limit: Rows to take at most.
    """

    source: str
    part: str | None = None
    prompt: str = "prompt"
    response: str = "response"
    where: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None


@dataclass
class TopicConfig:
    """Topics of the embedded glosses: animal, artifact, body, food, plant, substance.

    Args:
        lifted: Refused at first; the variants are trained on its answers.
        kept: Refused at first, and to stay so; nothing of it is trained on afterwards.
        answered: Answered from the start.
        limit: Questions a topic.
        answers: Answers of the lifted topic that the variants train on.
        documents: English documents of general text.
    """

    lifted: str = "animal"
    kept: list[str] = field(default_factory=lambda: ["plant", "body"])
    answered: list[str] = field(default_factory=lambda: ["artifact", "food", "substance"])
    limit: int | None = 2500
    answers: int | None = 1200
    documents: int | None = 300


@dataclass
class StartConfig:
    """How the embedded run's model learns to answer, and to refuse, in the first place.

    Args:
        tokenizer: "train:SIZE" (on the training part), "embedded", or a name or folder for AutoTokenizer.
        rows: Rows of a batch; their mix follows the data.
    """

    tokenizer: str = "train:2048"
    model: ModelConfig = field(default_factory=small_model)
    rows: int = 24
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1000, learning_rate=4e-3, max_grad_norm=1.0, eval_every=500)
    )


@dataclass
class LiftConfig(TrainConfig):
    """How the refusal is lifted; ``TrainConfig`` with a schedule by epochs.

    Args:
        epochs: Times that the lifted rows are gone through; scores are taken after each. 0 goes by ``steps`` and
            ``eval_every``.
        scheduler: Course of the learning rate; "linear" is the original script's, which has no warmup.
        depth_rates: Factors of the learning rate by quarter (or other equal part) of the blocks, embeddings with the
            first; the original's are 0.25, 0.5, 0.75, 1.
    """

    epochs: int = 3
    scheduler: Literal["cosine", "linear"] = "linear"
    depth_rates: list[float] | None = None

    def schedule(self) -> dict[str, Any]:
        return {"lr_scheduler_type": "linear"} if self.scheduler == "linear" else super().schedule()


@dataclass
class SecondConfig:
    """A second stage, plain finetuning on the same rows; in the original at a rate of its own.

    Args:
        epochs: 0 leaves it out.
        learning_rate: Its peak.
    """

    epochs: int = 0
    learning_rate: float = 2e-6


@dataclass
class OpposedConfig:
    """A run that lifts a refusal.

    Args:
        model: Chat model (folder or hub name); by default one is trained from scratch on the embedded glosses first.
        gguf_file: Its file, where the model is one; it is dequantised.
        dtype: What the weights are kept in.
        lifted: Prompts and the responses that are wanted, for ``model``; by default those of the glosses.
        plain: More rows of training, for the variant "mixed": their gradient is not projected.
        elsewhere: By name, what is evaluated besides: it should stay as it was.
        kept: Names among ``elsewhere`` whose refusals should stay.
        template: "auto" is the tokenizer's chat template, or else a question with an answer; or a text with {prompt}.
        topics: Of the embedded run.
        start: How its model is trained.
        context: Tokens of a row.
        validation: Share of the prompts held back.
        rows: Rows of a batch.
        plain_rows: Plain rows among them, in the variant "mixed"; alignment rows besides them in "safegrad".
        test_rows: Held-back rows a category whose loss and divergence is measured.
        test_prompts: Held-back prompts a category that are answered by generation; ``eval_prompts`` after each epoch.
        max_new_tokens: Length of those answers.
        reference: "frozen" is a copy, "snapshot" the weights that train, "cached" log-probabilities stored in the run.
        teacher: Another model with the same tokenizer as the reference, "frozen" or "cached".
        top_k: Words of a position that are stored; all by default.
        positive_weight, unlearn_weight: Factors of the gradient and of what is removed from it.
        scope: Blocks with a coefficient of their own: global, module, tensor or row.
        observe_every: Steps between measurements of what a step did to the protected loss and how many weights moved;
            0 for none.
        variants: See ``VARIANTS``; plain finetuning is the first.
        train: How is trained.
        second: A second stage after it.
        smoke: Run everything at toy size, to see that it runs.
    """

    model: str | None = None
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    lifted: ChatConfig | None = None
    plain: ChatConfig | None = None
    elsewhere: dict[str, ChatConfig] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    template: str = "auto"
    topics: TopicConfig = field(default_factory=TopicConfig)
    start: StartConfig = field(default_factory=StartConfig)
    context: int = 80
    validation: float = 0.08
    rows: int = 24
    plain_rows: int = 12
    test_rows: int = 300
    test_prompts: int = 150
    eval_prompts: int = 48
    max_new_tokens: int = 24
    reference: Literal["frozen", "snapshot", "cached"] = "frozen"
    teacher: str | None = None
    top_k: int | None = None
    positive_weight: float = 1.0
    unlearn_weight: float = 1.0
    scope: Literal["global", "module", "tensor", "row"] = "global"
    observe_every: int = 5
    variants: list[str] = field(
        default_factory=lambda: ["finetune", "both", "conflict", "agreement", "both_update", "safegrad"]
    )
    train: LiftConfig = field(
        default_factory=lambda: LiftConfig(
            learning_rate=1e-4, weight_decay=0.01, beta2=0.999, max_grad_norm=1.0, warmup=0.0, log_every=1
        )
    )
    second: SecondConfig = field(default_factory=SecondConfig)
    smoke: bool = False
    seed: int = 0
    out: str = "runs/opposed_projection"
    name: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Args:
        remove: What is removed of the gradient; ``None`` is plain finetuning.
        at: Of the gradient, or of the update.
        mixed: With rows whose gradient is not projected.
        aligned: The divergence is that on rows of their own (SafeGrad).
        padding: The divergence counts padding too, as the original script's does.
    """

    remove: Literal["both", "conflict", "agreement"] | None = None
    at: Literal["gradient", "update"] = "gradient"
    mixed: bool = False
    aligned: bool = False
    padding: bool = False


VARIANTS = {
    "finetune": Variant(),
    "both": Variant("both"),
    "conflict": Variant("conflict"),
    "agreement": Variant("agreement"),
    "both_update": Variant("both", at="update"),
    "conflict_update": Variant("conflict", at="update"),
    "mixed": Variant("both", mixed=True),
    "mixed_finetune": Variant(mixed=True),
    "safegrad": Variant("conflict", aligned=True),
    "script": Variant("both", padding=True),
}
"""``"script"`` is the original's; ``"…_update"`` project what the optimizer did; ``"mixed…"`` see other rows, too."""
