"""Configuration of a policy-gradient run with a quarantine, its variants and their methods."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import gradsurgery as gs
from gradsurgery import methods
from gradsurgery.adapters import Adapter, Kinds, Quantile
from gradsurgery.errors import PlanError
from gradsurgery.estimators.direction import Direction
from gradsurgery.runs import quarantine_controls as controls
from gradsurgery.runs.quarantine_controls import Variant, method_for
from gradsurgery.runs.quarantine_grpo_task import TaskConfig
from gradsurgery.surgery import Method, Pass

VARIANTS: dict[str, Variant] = {
    "plain": Variant("plain policy gradients on the kept part; no quarantine"),
    "filter": Variant("plain, and flagged rollouts are left out of rewards and baselines"),
    **{name: variant for name, variant in controls.VARIANTS.items() if name != "plain"},
    "no_flags": Variant("as route, and nobody is flagged", "route", "given", None, True),
}
"""Those of every recipe with a quarantine; the filter that routing by labels competes with; and one more control.

A policy that trains with a quarantine on rollouts written without it is held back by the importance weights alone: what
flags add is what lies above ``no_flags``.
"""

BASELINES = ("plain", "filter")
KINDS = Kinds("kind", ("honest", "hack", "teacher"))
"""Kinds of rollouts in the metrics: the policy's own that are no hacks, those that are, and a teacher's."""


@dataclass
class DetectorConfig:
    """The weak detector: what it knows about single rollouts.

    Args:
        recall: Share of the hacks that it flags (its true positive rate).
        fpr: Share of the other rollouts that it flags by mistake.
        cleared: Share of the other rollouts that it knows to be legitimate, for "absorb": the rest trains both parts.
    """

    recall: float = 0.5
    fpr: float = 0.0
    cleared: float = 0.5


@dataclass
class StartConfig:
    """The policy of the embedded run, trained from scratch on the answers of a mediocre pupil.

    Args:
        options: Of a Llama configuration; vocabulary and special tokens come from the tokenizer.
        steps, rows, learning_rate: Of its training.
        right: Share of the sums that the pupil answers rightly; statements it mostly does.
        hacks: Share of the answers that are claims: without any, no policy would find the loophole.
    """

    options: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32,
        }
    )
    steps: int = 700
    rows: int = 64
    learning_rate: float = 3e-3
    right: float = 0.4
    hacks: float = 0.1


@dataclass
class PolicyConfig:
    """How the policy is trained, by TRL's ``GRPOTrainer``.

    Args:
        steps: Optimizer steps.
        prompts, generations: Questions a step, and rollouts of each.
        iterations: Steps that a batch of rollouts is used for.
        accumulation: Micro-batches of a step.
        learning_rate: Constant.
        beta: Weight of the divergence from the policy before the adapter.
        loss: As TRL's ``loss_type``.
        teacher: Share of the rollouts that a teacher writes, who always hacks.
    """

    steps: int = 120
    prompts: int = 16
    generations: int = 8
    iterations: int = 1
    accumulation: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta: float = 0.0
    loss: str = "dr_grpo"
    temperature: float = 1.0
    max_new_tokens: int = 4
    teacher: float = 0.0
    bf16: bool = False
    checkpointing: bool = False
    log_every: int = 5


@dataclass
class ScoreConfig:
    """How rollouts are scored.

    Args:
        pairs: Questions answered by a claim and rightly, from which the direction comes.
        quantile: Rollouts whose score is above this quantile of recent ones are flagged.
        halflife: Rollouts after which a score weighs half.
    """

    pairs: int = 24
    quantile: float = 0.75
    halflife: float = 256.0


@dataclass
class AdapterConfig:
    """The adapter, the same for every variant.

    Args:
        modules: Which linear layers; never the output head, which TRL reads without calling it.
        rank, quarantine_rank: Of both parts.
    """

    modules: str | list[str] = "all-linear"
    rank: int = 8
    quarantine_rank: int = 8


@dataclass
class RelearnConfig:
    """The probe on what is left: full finetuning on as many claims as right answers.

    Args:
        steps, every: Its length, and how often it measures.
        rows: Rows a step, half of them claims.
        learning_rate: Of AdamW.
    """

    steps: int = 20
    every: int = 2
    rows: int = 16
    learning_rate: float = 3e-4


@dataclass
class GrpoConfig:
    """A policy-gradient run with a quarantine.

    Args:
        model: Causal language model (folder or hub name); by default a small one is trained from scratch first.
        dtype: What its weights are kept in.
        chat: Questions are put as chats, by the tokenizer's template.
        test_rows: Questions of each kind in an evaluation.
        variants: See ``VARIANTS``.
        smoke: Run everything at toy size, to see that it runs.
    """

    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat: bool = False
    task: TaskConfig = field(default_factory=TaskConfig)
    start: StartConfig = field(default_factory=StartConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    relearn: RelearnConfig = field(default_factory=RelearnConfig)
    test_rows: int = 400
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    smoke: bool = False
    seed: int = 0
    out: str = "runs/quarantine_grpo"
    name: str | None = None
    overwrite: bool = False


def check(config: GrpoConfig) -> None:
    """Raise a `PlanError` for options that make no run, before anything is done."""
    if importlib.util.find_spec("trl") is None:
        raise PlanError("policies are trained by TRL, which is not installed: pip install 'gradsurgery[trl]'.")
    require_variants(config.variants)
    shares = {f"detector.{name}": getattr(config.detector, name) for name in ("recall", "fpr", "cleared")}
    shares |= {"policy.teacher": config.policy.teacher, "start.right + start.hacks": config.start.right}
    shares["start.right + start.hacks"] += config.start.hacks
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise PlanError(f"{name} is a share from 0 to 1, not {share!r}.")
    policy = config.policy
    if policy.generations < 2 or policy.prompts < 1 or policy.steps < 1:
        raise PlanError("a group has two generations at least, a step one prompt, and a run one step.")
    if policy.prompts * policy.generations % policy.accumulation:
        raise PlanError(
            f"{policy.prompts} prompts of {policy.generations} generations cannot be cut into {policy.accumulation} "
            f"micro-batches; choose policy.accumulation a divisor of {policy.prompts * policy.generations}."
        )


def require_variants(names: Sequence[str]) -> None:
    """As `quarantine_controls.require_variants`, for the variants of a policy."""
    if unknown := [name for name in names if name not in VARIANTS]:
        raise PlanError(f"variants are {', '.join(VARIANTS)}, not {', '.join(unknown)}.")
    controls.require_variants([name for name in names if name in controls.VARIANTS])


def build_method(name: str, config: GrpoConfig, adapter: Adapter, direction: Direction | None) -> Method:
    """A variant's method, for ``adapter.host``."""
    if name in BASELINES:
        return Method([Pass(name)], update=[gs.freeze(adapter.quarantine)])
    if name == "absorb":
        return methods.quarantine(adapter, "absorb", "flag", clean="clean", kinds=KINDS)
    threshold = Quantile(config.score.quantile, config.score.halflife)
    kinds = None if VARIANTS[name].mode == "erase" else KINDS  # erasing tells no rows apart
    return method_for(VARIANTS[name], adapter, direction, threshold, kinds=kinds)
