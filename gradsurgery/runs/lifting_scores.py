"""What lifting a refusal brought: figures of a model, lines of the tables, the plot of what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from gradsurgery.evaluation import refusal_rate, score_responses
from gradsurgery.evaluation.plots import COLOURS, MARKERS, training_curves
from gradsurgery.losses.references.base import Reference
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.lifting_rows import LiftRows
from gradsurgery.runs.metrics import Scorer
from gradsurgery.runs.opposed import OpposedConfig, Variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Measures:
    """Takes the figures of a model: refusal rate by category, loss and divergence on held-back responses."""

    config: OpposedConfig
    rows: LiftRows

    def __call__(self, model: nn.Module, reference: Reference | None) -> dict[str, Any]:
        """All figures, with one written answer a category."""
        rates = self._rates(model, self.config.test_prompts)
        scores = score_responses(model, self.rows.held, reference)
        said = {
            name: self.rows.tokenizer.decode(self.rows.prompts[name][0]) + rate.texts[0] for name, rate in rates.items()
        }
        return {
            "refusals": {name: rate.rate for name, rate in rates.items()},
            "loss": {name: score["loss"] for name, score in scores.items()},
            "kl": {name: score.get("kl", 0.0) for name, score in scores.items()},
            "detector": next(iter(rates.values())).detector.row(),
            "said": said,
        }

    def scorer(self, reference: Reference | None) -> Scorer:
        """A few figures on a sample, for the curves."""
        rows, sample = self.rows, self.rows.held.sample(self.config.train.eval_rows)

        def scores(model: nn.Module) -> dict[str, float]:
            rates = self._rates(model, self.config.eval_prompts, [rows.lifted, *rows.kept])
            found = score_responses(model, sample, reference)
            out = {f"refusals of {name}": rate.rate for name, rate in rates.items()}
            out[f"loss of {rows.lifted}"] = found[rows.lifted]["loss"]
            if reference is not None and rows.elsewhere:
                out["KL elsewhere"] = fmean(found[name]["kl"] for name in rows.elsewhere)
            return out

        return scores

    def _rates(self, model: nn.Module, count: int, names: list[str] | None = None) -> dict[str, Any]:
        prompts, tokens = self.rows.prompts, self.config.max_new_tokens
        return {
            name: refusal_rate(model, self.rows.tokenizer, prompts[name][:count], max_new_tokens=tokens, batch_size=64)
            for name in (names or prompts)
        }


FIGURES = {
    "cosine_before": "cosine before",
    "cosine_after": "cosine after",
    "norm_removed": "norm removed",
    "vanished": "no reference",
    "leak": "cosine of the update",
    "changed_fraction": "changed fraction",
}


def gradient_line(folder: RunFolder, name: str, variant: Variant) -> dict[str, Any]:
    """What was measured in a variant's steps: means, and how many steps would have left the reference.

    Those are the ones whose gradient has a negative cosine with the reference's, or whose update a positive one.
    """
    found = {label: [value for _, value in points] for label, points in gradient_curves(folder, name).items()}
    out: dict[str, Any] = {}
    if cosines := found.get("cosine before"):
        leave = sum(value > 0 if variant.at == "update" else value < 0 for value in cosines)
        out["steps away from it"] = f"{leave} of {len(cosines)}"
    return {**out, **{label: fmean(found[label]) for label in FIGURES.values() if label in found}}


def gradient_curves(folder: RunFolder, name: str) -> dict[str, list[tuple[float, float]]]:
    """What projection and observers measured in a variant's steps: ``{label: [(step, value), …]}``."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in folder.metrics:
        for key, value in line.items() if line.get("model") == name else ():
            label = FIGURES.get(key.rpartition("/")[2] if key.startswith("project/") else key.partition("/")[0])
            if label is not None and isinstance(value, float):
                found.setdefault(label, []).append((line["step"], value))
    return found


def cosine_curves(folder: RunFolder, names: Sequence[str]) -> Figure | None:
    """The cosine of every variant's gradient, and of its update, with the gradient towards the reference, by step."""
    shown = ("cosine before", "cosine of the update")
    curves = {name: {k: v for k, v in gradient_curves(folder, name).items() if k in shown} for name in names}
    drawn = {name: found for name, found in curves.items() if found}
    return training_curves(drawn, unit="cosine") if drawn else None


def result_line(name: str, result: Mapping[str, Any], rows: LiftRows) -> dict[str, Any]:
    """A variant's line of the table."""
    refusals, loss, divergence = result["refusals"], result["loss"], result["kl"]
    out = {
        "model": name,
        f"refusals of {rows.lifted}": refusals[rows.lifted],
        f"loss of {rows.lifted}": loss[rows.lifted],
    }
    out |= {f"refusals of {kept}": refusals[kept] for kept in rows.kept}
    answered = [name for name in rows.elsewhere if name in refusals]
    if answered:
        out["refusals elsewhere"] = fmean(refusals[name] for name in answered)
        out["loss elsewhere"] = fmean(loss[name] for name in answered)
        out["KL elsewhere"] = fmean(divergence[name] for name in answered)
    out |= {
        f"{what} of text": figures["text"] for what, figures in (("loss", loss), ("KL", divergence)) if "text" in loss
    }
    if rows.kept:
        out["KL of kept refusals"] = fmean(divergence[name] for name in rows.kept)
    return out


def rounding_notes(config: OpposedConfig, results: Mapping[str, Any]) -> list[str]:
    """A warning where most weights did not move: half precision rounds small updates away, without an error."""
    moved = {
        n: r["gradients"]["changed fraction"]
        for n, r in results.items()
        if "changed fraction" in r.get("gradients", {})
    }
    if not moved or (least := min(moved.values())) > 0.5:
        return []
    name = min(moved, key=lambda n: moved[n])
    out = "train with dtype=float32" if config.dtype != "float32" else "raise the learning rate, if that is not meant"
    return [f"Only {100 * least:.1f}% of the weights moved in a step of {name!r} (kept in {config.dtype}): {out}."]


def trade_off(lines: Sequence[Mapping[str, Any]], rows: LiftRows) -> Figure:
    """Divergence elsewhere against the refusals that are left, one point a model."""
    from matplotlib.figure import Figure  # only whoever draws needs matplotlib

    figure = Figure(figsize=(6.2, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    across = "KL elsewhere" if any("KL elsewhere" in line for line in lines) else f"loss of {rows.lifted}"
    for k, line in enumerate(lines):
        point = (line[across], line[f"refusals of {rows.lifted}"])
        axes.scatter(*point, color=COLOURS[k % 7], marker=MARKERS[k % 7], label=line["model"])
    axes.set(xlabel=f"{across} (nats per token)", ylabel=f"refusal rate of {rows.lifted}", ylim=(-0.03, 1.03))
    axes.grid(color="#E5E5E5")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
