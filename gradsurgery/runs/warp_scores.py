"""What a finetune brought and what it cost the protected behaviour: figures, lines of the tables, the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradsurgery.estimators import Coordinates
from gradsurgery.estimators.importance import rotated
from gradsurgery.evaluation import exact_match, final_number, first_line, refusal_rate, score_responses
from gradsurgery.evaluation.plots import COLOURS, MARKERS
from gradsurgery.runs.metrics import Scorer
from gradsurgery.runs.warp import WarpConfig
from gradsurgery.runs.warp_rows import PROTECTED, TASK, WarpRows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Measures:
    """Takes the figures of a model: refusal rates, losses, and problems of the task that it solves."""

    config: WarpConfig
    rows: WarpRows

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """All figures, with one answer written for each kind of prompt."""
        config, rows = self.config, self.rows
        rates = {name: self._rate(model, name, config.test_prompts) for name in rows.prompts}
        solved = exact_match(
            model,
            rows.tokenizer,
            rows.problems,
            rows.answers,
            read=final_number if config.read == "number" else first_line,
            max_new_tokens=config.task_tokens,
            batch_size=64,
        )
        said = {name: rows.tokenizer.decode(rows.prompts[name][0]) + rate.texts[0] for name, rate in rates.items()}
        return {
            "refusals": {name: rate.rate for name, rate in rates.items()},
            "exact_match": solved.rate,
            "unread": solved.unread,
            "loss": {name: score["loss"] for name, score in score_responses(model, rows.held).items()},
            "detector": rates[PROTECTED].detector.row(),
            "said": {**said, TASK: rows.tokenizer.decode(rows.problems[0]) + solved.texts[0]},
        }

    def scorer(self) -> Scorer:
        """A few figures on a sample, for the curve of forgetting."""
        sample = self.rows.held.sample(self.config.train.eval_rows)

        def scores(model: nn.Module) -> dict[str, float]:
            found = score_responses(model, sample)
            out = {f"loss of {name}": found[name]["loss"] for name in (PROTECTED, TASK)}
            return {"refusals": self._rate(model, PROTECTED, self.config.eval_prompts).rate, **out}

        return scores

    def _rate(self, model: nn.Module, name: str, count: int) -> Any:
        tokens = self.config.max_new_tokens
        prompts = self.rows.prompts[name][:count]
        return refusal_rate(model, self.rows.tokenizer, prompts, max_new_tokens=tokens, batch_size=64)


@torch.no_grad()
def movement(model: nn.Module, start: nn.Module, coordinates: Coordinates | None) -> dict[str, Any]:
    """How much of the weights a variant kept, and how far that moved, relative to its norm; the worst weight."""
    if coordinates is None:
        return {}
    basis, worst = coordinates.basis, 0.0
    for name in coordinates.names:
        before, after = (rotated(basis, name, m.get_parameter(name).detach().cpu().double()) for m in (start, model))
        mask = coordinates.masks[name] if coordinates.masks is not None else torch.ones(1, dtype=torch.bool)
        size = float((before * mask).norm())
        worst = max(worst, float(((after - before) * mask).norm()) / size if size else 0.0)
    return {"kept": coordinates.count() / coordinates.numel(), "kept moved": worst}


def result_line(name: str, result: Mapping[str, Any], rows: WarpRows) -> dict[str, Any]:
    """A model's line of the table."""
    refusals, loss = result["refusals"], result["loss"]
    out: dict[str, Any] = {
        "model": name,
        "task: exact match": result["exact_match"],
        "task: loss": loss[TASK],
        "refusals": refusals[PROTECTED],
        "attack success": 1 - refusals[PROTECTED],
        "loss of refusals": loss[PROTECTED],
    }
    if rows.answered:
        out["refusals elsewhere"] = fmean(refusals[topic] for topic in rows.answered)
        out["loss elsewhere"] = fmean(loss[topic] for topic in rows.answered)
    return {**out, "kept": result.get("kept"), "kept moved": result.get("kept moved")}


def rotation_line(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the rotation adds at each ratio: WaRP's figures less those of the mask without it."""
    by_name = {line["model"]: line for line in lines}
    out = []
    for name, line in by_name.items():
        plain = by_name.get(name.replace("warp ", "mask ")) if name.startswith("warp ") else None
        if plain is not None:
            figures = ("task: exact match", "task: loss", "refusals", "loss of refusals")
            out.append({"kept": name.removeprefix("warp "), **{key: line[key] - plain[key] for key in figures}})
    return out


def trade_off(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """What is left of the behaviour against what the task gained, one point a model."""
    from matplotlib.figure import Figure  # only whoever draws needs matplotlib

    figure = Figure(figsize=(6.4, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for k, line in enumerate(lines):
        marker, colour = MARKERS[k % len(MARKERS)], COLOURS[(k + k // len(MARKERS)) % len(COLOURS)]
        axes.scatter(line["task: loss"], line["loss of refusals"], color=colour, marker=marker, label=line["model"])
    axes.set(xlabel="loss of the task (nats per token)", ylabel="loss of the protected refusals")
    axes.set_yscale("log")
    axes.grid(color="#E5E5E5")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
