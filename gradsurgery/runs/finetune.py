"""What a private finetune is made of: texts, the method of a variant, who looks at the result, what it brought."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gradsurgery import methods
from gradsurgery.anatomy import Anatomy
from gradsurgery.data import MixedSampler, Rows, load_bilingual
from gradsurgery.errors import PlanError
from gradsurgery.evaluation.tiers import wrong_key
from gradsurgery.keys import PermutationKey
from gradsurgery.runs import setup, tiers
from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.private import VARIANTS, PrivateConfig, Variant
from gradsurgery.runs.steps import OrderedRows, OrderedStreams, Steps
from gradsurgery.surgery import Method


@dataclass
class Start:
    """What is finetuned: a checkpoint, its keys, tokenizer and anatomy."""

    model: str
    keys: list[PermutationKey]
    key_files: list[str]
    tokenizer: Any
    anatomy: Anatomy

    def load(self, where: Path | None = None) -> PreTrainedModel:
        """The checkpoint, or one that a variant left; in fp32, since small updates are lost in half precision."""
        return AutoModelForCausalLM.from_pretrained(where or self.model, dtype=torch.float32)


@dataclass
class Texts:
    """Training rows by category, and held-back sequences by category."""

    rows: dict[str, Rows]
    held_back: dict[str, Tensor]

    def stream(self, category: str, size: int, config: PrivateConfig, steps: int) -> OrderedRows:
        rows = self.rows[category]
        return OrderedRows(rows, MixedSampler(rows, size, seed=config.seed), steps)

    def sample(self, training: TrainConfig) -> dict[str, Tensor]:
        """What is evaluated on during training."""
        return {category: ids[: training.eval_rows] for category, ids in self.held_back.items()}


def load_texts(config: PrivateConfig, tokenizer: Any) -> Texts:
    corpus = load_bilingual(config.data, validation=config.validation, limit=config.limit)
    private = {name: setup.choose(corpus, [name]) for name in config.private}
    rows = {name: setup.plain_rows(part, tokenizer, config.context, config.seed) for name, part in private.items()}
    public = setup.choose(corpus, config.public)
    rows["public"] = setup.plain_rows(public, tokenizer, config.context, config.seed)
    evaluated = {**public, **{name: part[name] for name, part in private.items()}}
    return Texts(rows, setup.held_back(evaluated, tokenizer, config.context, config.test_rows))


def build_method(variant: Variant, stage: int, config: PrivateConfig, start: Start) -> Method:
    if variant.adapters:
        return methods.plain()
    key = key_of(variant, stage, config, start)
    weight = config.kl_weight if variant.kl else 0.0
    anchors = start.keys[:stage] if config.anchors and weight else []
    return methods.private_finetune(
        key,
        start.anatomy,
        weight,
        anchors=anchors,
        decoys=config.decoys if variant.decoys else 0,
        decoy_weight=config.decoy_weight,
        decoy_fraction=config.decoy_fraction,
        l2=0.0 if variant.own_key else config.l2,
        permute=variant.permute,
    )


def key_of(variant: Variant, stage: int, config: PrivateConfig, start: Start) -> PermutationKey:
    """The stage's key, or one of the same size that somebody without it drew."""
    key = start.keys[stage]
    return wrong_key(key, start.anatomy, seed=config.seed + 7) if variant.own_key else key


def build_steps(method: Method, stage: int, config: PrivateConfig, texts: Texts, steps: int) -> Steps:
    private = texts.stream(config.private[stage], config.rows["private"], config, steps)
    wanted = {p.stream for p in method.passes}
    if wanted == {None}:
        return private
    public = texts.stream("public", config.rows["public"], config, steps)
    return OrderedStreams({name: s for name, s in (("private", private), ("public", public)) if name in wanted})


def holders_of(variant: Variant, stage: int, config: PrivateConfig, start: Start) -> dict[str, tiers.Keys]:
    """Who looks at a finished model, and under which keys; scores are means over a holder's keys."""
    if variant.adapters:
        return {"adapters": [None]}
    out: dict[str, tiers.Keys] = {"C1": [None]}
    if variant.own_key:
        return out | {"own key": [key_of(variant, stage, config, start)]}
    out |= {f"C{k + 2}": [key] for k, key in enumerate(start.keys)}
    guesses = config.guesses
    if guesses.count:
        out |= tiers.guesses(start.keys[stage], start.anatomy, guesses.count, guesses.known, config.seed)
    return out


def trained_view(variant: Variant, stage: int) -> str:
    """The holder for whom a variant trains."""
    if variant.adapters:
        return "adapters"
    if not variant.permute:
        return "C1"
    return "own key" if variant.own_key else f"C{stage + 2}"


def result_name(name: str, stage: int, config: PrivateConfig) -> str:
    return f"{name}_stage{stage + 1}" if len(config.private) > 1 else name


def starting_point(name: str, stage: int, config: PrivateConfig, folder: RunFolder) -> Path | None:
    """The model that a variant starts from: another variant's, its own of the stage before, or (``None``) the given.

    Raises:
        PlanError: the other variant has not been trained.
    """
    after, of = VARIANTS[name].after, stage
    if after is None:
        after, of = name, stage - 1
    if of < 0:
        return None
    if not (path := folder / "models" / result_name(after, of, config)).is_dir():
        raise PlanError(f"{name} starts from the finished model of {after!r}: put {after} before it in variants.")
    return path


def shown(plan: str) -> str:
    """A plan as text, with one decoy for all of them."""
    first, _, others = plan.partition("\npass 'decoy 2'")
    last = others.rfind("\nupdate:")
    return f"{first}\n… and the other decoys{others[last:]}" if others else plan


def summary(result: dict[str, Any], before: dict[str, tiers.Figures], view: str, private: str) -> dict[str, Any]:
    """What a variant brought to the holder it trained for, and what of it others got.

    A holder's gain is how far their loss after finetuning is below the keyed tier's before it; shares are of the
    gain of the holder who was trained for.
    """
    scores, at_first = result["scores"], before[view if view in before else "C2"][private]["loss"]
    gain = {holder: at_first - figures[private]["loss"] for holder, figures in scores.items()}
    out = {f"{private} gain": gain[view]}
    if view[0] == "C" and view != "C1":
        moved = {c: f["loss"] - before["C1"][c]["loss"] for c, f in scores["C1"].items() if c != private}
        out |= {f"{category} moved in C1": by for category, by in moved.items()}
        out[f"{private} of C1 above {view}"] = scores["C1"][private]["loss"] - scores[view][private]["loss"]
        out |= {f"share of {holder}": gain[holder] / gain[view] for holder in gain if holder[0] != "C"}
    return {**out, "public entries changed": result.get("public entries changed"), "entries": result["entries"]}
