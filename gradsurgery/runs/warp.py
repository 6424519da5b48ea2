"""The configuration of a run that finetunes without moving what other data needs, and its variants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.opposed import ChatConfig, LiftConfig, OpposedConfig
from gradsurgery.runs.pretrain import small_model
from gradsurgery.runs.setup import ModelConfig

PHASES = ("behaviour", "basis", "importance", "train")


@dataclass
class GlossConfig:
    """Topics of the embedded glosses: animal, artifact, body, food, plant, substance.

    Args:
        refused: Questions about them are refused: the behaviour to protect.
        answered: Questions about them are answered.
        task: The task that is trained afterwards is to name the kind of what a gloss of these describes.
        limit: Questions a topic.
    """

    refused: list[str] = field(default_factory=lambda: ["animal", "plant"])
    answered: list[str] = field(default_factory=lambda: ["artifact", "food"])
    task: list[str] = field(default_factory=lambda: ["substance", "body"])
    limit: int | None = 1500


@dataclass
class BehaviourConfig:
    """Phase 0: how the behaviour is learned that is to survive.

    Args:
        wanted: By default where no model is given; ``True`` trains a given one first, too.
        tokenizer: Of a model from scratch: "train:SIZE" (on the training part), "embedded", or a name or folder.
        model: Its shape.
        rows: Rows of a batch.
    """

    wanted: bool | None = None
    tokenizer: str = "train:2048"
    model: ModelConfig = field(default_factory=small_model)
    rows: int = 24
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=500, learning_rate=4e-3, max_grad_norm=1.0, eval_every=0, save_every=200
        )
    )


@dataclass
class BasisConfig:
    """Phase 1; the options of ``gs.estimators.activation_basis``.

    Args:
        samples: Rows of the protected data.
        rows: Rows of a batch.
        outputs: Make bases of the outputs as well, which ActSVD takes.
        store: What bases are kept in.
        device: Where finished bases go.
    """

    samples: int = 500
    rows: int = 25
    positions: Literal["all", "response"] = "all"
    skip_first: int = 0
    centre: bool = False
    normalise: Literal["token"] | None = None
    winsorise: float | None = None
    top_k: int | None = None
    outputs: bool = False
    store: Literal["float32", "bfloat16"] = "float32"
    passes: int = 1
    device: str | None = None


@dataclass
class ImportanceConfig:
    """Phase 2.

    Args:
        samples: Rows of the protected data.
        rows: Rows of a batch.
        per: What a gradient is taken of, and what counts the same.
        scope: Whether the share is taken of every weight or of all together.
        original: Also in the weights' own coordinates, which the mask without a rotation takes.
        ratios: Shares of the coordinates that are kept.
        task: Also on the task's rows, for what the behaviour needs and the task does not.
    """

    samples: int = 500
    rows: int = 10
    per: Literal["batch", "sample", "token"] = "batch"
    scope: Literal["layer", "global"] = "layer"
    original: bool = True
    ratios: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.1, 0.2])
    task: bool = False


@dataclass
class WarpConfig:
    """A run of WaRP.

    Args:
        model: Causal language model (folder or hub name); by default one is trained from scratch in phase 0.
        gguf_file: Its file, where the model is one; it is dequantised.
        dtype: What the weights are kept in.
        protected: Prompts and the responses to keep; by default refusals of the embedded glosses' topics.
        task: Prompts and responses to train on; by default kinds of glosses. Its source "gsm8k_100" is shipped.
        language: Of "gsm8k_100": en or es.
        read: How an answer of the task is read: the final number, or the first line.
        template: "auto" is the tokenizer's chat template, or else a question with an answer; or a text with {prompt}.
        glosses: Of the embedded runs.
        layers: all, early, middle, late (thirds), last, a number or a range such as 30-31.
        projections: attn_q, attn_k, attn_v, attn_o, ffn_up, ffn_gate, ffn_down; or names as `gs.region` takes them.
        context: Tokens of a row.
        validation: Share of the prompts held back.
        task_samples: Rows to train on.
        rows: Rows of a batch.
        protected_rows: Protected rows besides them in the variant "mixed".
        mix_weight: Their weight in its loss.
        energy: Share of the inputs (outputs) that GPM (ActSVD) keeps.
        others: Whether parameters without a basis train as well.
        test_rows: Held-back rows a category whose loss is measured.
        test_prompts: Held-back prompts a category that are answered by generation; ``eval_prompts`` for the curves.
        max_new_tokens: Length of the answers whose refusal is looked for; ``task_tokens`` of the task's.
        behaviour, basis, importance, train: The phases.
        variants: See ``VARIANTS``.
        behaviour_run, basis_run, importance_run: Folder of an earlier phase; by default the latest one that fits.
        smoke: Run everything at toy size, to see that it runs.
    """

    model: str | None = None
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    protected: ChatConfig | None = None
    task: ChatConfig | None = None
    language: Literal["en", "es"] = "en"
    read: Literal["number", "line"] = "line"
    template: str = "auto"
    glosses: GlossConfig = field(default_factory=GlossConfig)
    layers: str = "all"
    projections: list[str] = field(default_factory=lambda: ["all-linear"])
    context: int = 64
    validation: float = 0.08
    task_samples: int | None = None
    rows: int = 16
    protected_rows: int = 4
    mix_weight: float = 0.2
    energy: float = 0.97
    others: Literal["train", "freeze"] = "freeze"
    test_rows: int = 150
    test_prompts: int = 100
    eval_prompts: int = 24
    max_new_tokens: int = 12
    task_tokens: int = 12
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    basis: BasisConfig = field(default_factory=BasisConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    train: LiftConfig = field(
        default_factory=lambda: LiftConfig(
            steps=150,
            epochs=0,
            scheduler="cosine",
            learning_rate=1e-3,
            weight_decay=0.01,
            beta2=0.999,
            max_grad_norm=1.0,
            eval_every=50,
            eval_rows=32,
            save_every=75,
            log_every=10,
        )
    )
    variants: list[str] = field(default_factory=lambda: ["full", "linear", "mask", "warp", "gpm", "mixed"])
    behaviour_run: str | None = None
    basis_run: str | None = None
    importance_run: str | None = None
    smoke: bool = False
    seed: int = 0
    out: str = "runs/warp"
    overwrite: bool = False


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Args:
        keeps: What stays where it is.
        by_ratio: Once for each ratio of the importances.
        about: For the report.
    """

    keeps: Literal["nothing", "others", "entries", "rotated", "columns", "rows"]
    by_ratio: bool = False
    about: str = ""


VARIANTS: dict[str, Variant] = {
    "full": Variant("nothing", about="full finetuning: every parameter trains"),
    "linear": Variant("others", about="finetuning of the weights that have a basis, nothing kept"),
    "mask": Variant("entries", True, "their most important entries kept, no rotation"),
    "warp": Variant("rotated", True, "WaRP: their most important rotated coordinates kept"),
    "warp_minus": Variant("rotated", True, "WaRP, without coordinates that are as important for the task"),
    "gpm": Variant("columns", about="GPM: whole input directions kept"),
    "actsvd": Variant("rows", about="ActSVD: whole output directions kept"),
    "mixed": Variant("nothing", about="full finetuning with protected rows mixed in"),
}


def expanded(config: WarpConfig) -> dict[str, tuple[str, float | None]]:
    """The models of a run by label: variant and kept ratio."""
    out: dict[str, tuple[str, float | None]] = {}
    for name in config.variants:
        ratios: list[Any] = config.importance.ratios if VARIANTS[name].by_ratio else [None]
        out |= {name if ratio is None else f"{name} {100 * ratio:g}%": (name, ratio) for ratio in ratios}
    return out


def learns_first(config: WarpConfig) -> bool:
    """Whether there is a phase 0."""
    return config.model is None if config.behaviour.wanted is None else config.behaviour.wanted


def loading(config: WarpConfig) -> OpposedConfig:
    """What loads models and tokenizers."""
    return OpposedConfig(model=config.model, gguf_file=config.gguf_file, dtype=config.dtype)
