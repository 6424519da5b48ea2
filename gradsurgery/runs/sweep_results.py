"""What the runs of a sweep found, over seeds: losses by role, leakage, relearning, compute penalty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradsurgery import evaluation
from gradsurgery.errors import DataError
from gradsurgery.evaluation.trade_off import TradeOff
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.removal_report import trade_offs
from gradsurgery.runs.sweep import Cell

ROLES = ("forget", "adjacent", "retain")
Setting = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Found:
    """One model of one run.

    Attributes:
        setting: The point of the grid.
        key: The same, hashable, for grouping over seeds.
        result: What the run stored.
        curve: Its trade-off along the checkpoints.
    """

    setting: dict[str, Any]
    key: Setting
    seed: int
    model: str
    result: dict[str, Any]
    curve: list[TradeOff]

    def loss(self, role: str, stage: str | None = None) -> float | None:
        """Mean loss over a role's categories, in the model as it is released (after removal), or at a stage."""
        stage = stage or ("after" if "after" in self.result else "before")
        losses = [self.result[stage][c] for c in self.result["roles"][role] if c in self.result.get(stage, {})]
        return sum(losses) / len(losses) if losses else None


def collect(cells: Iterable[Cell]) -> list[Found]:
    """The results of finished cells, model by model; a model that several cells of one setting have counts once."""
    out: dict[Any, Found] = {}
    for cell in cells:
        folder = RunFolder(cell.path, {}, main=False)
        setting = cell.point
        key = tuple((name, str(value)) for name, value in setting.items())
        results = folder.results()
        roles = next(iter(results.values()))["roles"] if results else {}
        curves = trade_offs(folder.metrics, roles) if results else {}
        for name, result in results.items():
            out.setdefault((key, cell.seed, name), Found(setting, key, cell.seed, name, result, curves.get(name, [])))
    if not out:
        raise DataError("the sweep has no result yet: run it first.")
    return list(out.values())


def by(found: Iterable[Found], *, model: bool = True) -> dict[tuple[Setting, str], list[Found]]:
    """Groups over seeds, in order of appearance."""
    out: dict[tuple[Setting, str], list[Found]] = {}
    for one in found:
        out.setdefault((one.key, one.model if model else ""), []).append(one)
    return out


def spread(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (nan for one value); ``None`` without values."""
    known = [value for value in values if value is not None]
    return (statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan) if known else None


def shown(found: tuple[float, float] | None, digits: int = 3) -> str | None:
    """``mean ± standard deviation``, or the one value."""
    if found is None:
        return None
    return f"{found[0]:.{digits}f}" + ("" if math.isnan(found[1]) else f" ± {found[1]:.{digits}f}")


def loss_rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """A row for each setting, model and stage: losses by role, mean ± standard deviation over seeds."""
    rows = []
    for (_, model), group in by(found).items():
        for stage in ("before", "after", "calibrated"):
            if stage in group[0].result:
                losses = {f"{role} loss": shown(spread(one.loss(role, stage) for one in group)) for role in ROLES}
                removed = "after" in group[0].result
                named = {"after": "after removal", "before": "before removal" if removed else ""}.get(stage, stage)
                rows.append({**group[0].setting, "model": model, "stage": named, "seeds": len(group), **losses})
    return rows


def leakages(found: Sequence[Found]) -> Iterator[tuple[Found, evaluation.Leakage]]:
    """Leakage of every model with undiscovered data that is no filter, against filters and plain training of its seed.

    Baselines share everything but ``labels.undiscovered``: filters are exposed to what is undiscovered, plain training
    to all of it.
    """
    for one in found:
        if one.model in ("plain", "data_filter", "strict_filter") or not one.result["tokens"]["undiscovered"]:
            continue
        peers = [o for o in found if o.seed == one.seed and _else(o) == _else(one)]
        amounts: dict[float, float] = {}
        for peer in peers:
            kind = {"data_filter": "undiscovered", "plain": "forget"}.get(peer.model)
            loss = peer.loss("forget")
            if kind is not None and loss is not None:
                amounts.setdefault(peer.result["tokens"][kind], loss)
        loss = one.loss("forget")
        if len(amounts) > 1 and loss is not None:
            yield one, evaluation.leakage(loss, one.result["tokens"]["undiscovered"], amounts.items())


def _else(one: Found) -> Setting:
    return tuple(pair for pair in one.key if pair[0] != "labels.undiscovered")


def leakage_rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    groups: dict[tuple[Setting, str], list[tuple[Found, evaluation.Leakage]]] = {}
    for one, leak in leakages(found):
        groups.setdefault((one.key, one.model), []).append((one, leak))
    rows = []
    for (_, model), group in groups.items():
        bounds = {leak.bound for _, leak in group}
        value = shown(spread(leak.value for _, leak in group), 4)
        mark = "" if bounds == {"="} else f" ({', '.join(str(leak) for _, leak in group)})"
        rows.append({**group[0][0].setting, "model": model, "leakage": f"{value}{mark}", "seeds": len(group)})
    return rows


def gap_rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """How far the trade-off curves lie left of the filters' (and above them), seed by seed at the same setting."""
    rows = []
    curves = {(one.key, one.seed, one.model): one.curve for one in found if one.curve}
    for (key, model), group in by(found).items():
        for filtered in ("data_filter", "strict_filter"):
            pairs = [(one.curve, curves.get((key, one.seed, filtered))) for one in group if one.curve]
            if model in ("plain", "data_filter", "strict_filter") or not any(other for _, other in pairs):
                continue
            left, above = (
                [gap(mine, other) if other else None for mine, other in pairs]
                for gap in (evaluation.retain_gap, evaluation.forget_gap)
            )
            rows.append(
                {
                    **group[0].setting,
                    "model": model,
                    "against": filtered,
                    "retain loss less at equal forget loss": shown(spread(left)),
                    "left in": shown_share(left),
                    "forget loss more at equal retain loss": shown(spread(above)),
                    "above in": shown_share(above),
                }
            )
    return rows


def shown_share(gaps: Sequence[float | None]) -> str:
    """``3 of 3``: in how many of the seeds whose curves share a loss the gap is positive."""
    known = [gap for gap in gaps if gap is not None]
    return f"{sum(gap > 0 for gap in known)} of {len(known)}"


def relearning_rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """Steps until the forget loss is that of plain training; ``None`` counts as the steps that were tried."""
    rows = []
    for (_, model), group in by(o for o in found if "relearn" in o.result).items():
        tried = [one.result["relearn"] for one in group]
        steps = [of["steps"] if of["steps"] is not None else of["curve"][-1]["step"] for of in tried]
        more = sum(of["steps"] is None for of in tried)
        said = shown(spread(map(float, steps)), 1)
        rows.append({**group[0].setting, "model": model, "steps": said, "not back": more, "seeds": len(group)})
    return rows


def penalties(found: Sequence[Found]) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """``{role: {model: penalty}}`` at the largest size, and the fitted curves; empty with fewer than 2 sizes.

    The compute of a model is that of plain training of its size: the budget, of which a filter uses less.
    """
    plain = [group for (_, model), group in by(found).items() if model == "plain"]
    sizes = {group[0].key: statistics.fmean(one.result["flops"] for one in group) for group in plain}
    if len(set(sizes.values())) < 2:
        return {}, []
    largest = max(sizes, key=lambda key: sizes[key])
    out: dict[str, dict[str, float]] = {}
    rows = []
    for role in ROLES:
        points = [(sizes[group[0].key], loss[0]) for group in plain if (loss := spread(o.loss(role) for o in group))]
        if len({c for c, _ in points}) < 2:
            continue
        compute, losses = zip(*points, strict=True)
        for (key, model), group in by(found).items():
            loss = spread(one.loss(role) for one in group)
            if key != largest or model == "plain" or loss is None:
                continue
            row: dict[str, Any] = {"role": role, "model": model}
            try:
                curve = evaluation.fit_scaling_curve(compute, losses, irreducible=len(set(compute)) > 3)
                got = evaluation.compute_penalty(curve, loss[0], sizes[largest])
                out.setdefault(role, {})[model] = got.value
                row |= {
                    "penalty": got.value,
                    "extrapolated": str(got.extrapolated),
                    "residual of the curve": curve.residual,
                }
                row |= {"a": curve.a, "b": curve.b, "alpha": curve.alpha, "sizes": curve.points}
            except DataError as error:
                row["said"] = str(error)
            rows.append(row)
    return out, rows


def mean_curve(groups: Sequence[Sequence[Any]], point: Callable[[Any], tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Means over seeds of curves whose points begin with the step, at the steps that all of them have."""
    tables: list[Mapping[float, tuple[float, ...]]] = [{point(p)[0]: point(p)[1:] for p in of} for of in groups]
    steps = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    return [(s, *(statistics.fmean(c) for c in zip(*(t[s] for t in tables), strict=True))) for s in steps]
