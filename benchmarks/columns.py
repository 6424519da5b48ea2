"""The same rows for every model, device and way of running it: a step of each method against the stock step.

python -m benchmarks --sections columns --models 34m 254m --compile both

The stock model and that with the method are two around one set of weights and moments
(`benchmarks.models.twin`), so that what fits in training fits here.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gradsurgery as gs
from benchmarks.keys import key_of
from benchmarks.memory import allocated
from benchmarks.models import LEAST, Setting, fill, optimizer_of, release, stock_step, twin
from benchmarks.timing import interleaved
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import GradsurgeryError
from gradsurgery.estimators.basis import Basis, Site
from gradsurgery.estimators.targets import targets_of
from gradsurgery.evaluation.tables import table

FORGET_NEURONS, HELD = 64, 0.1
Batch = dict[str, Any]


def forget_units(anatomy: gs.Anatomy) -> gs.Units:
    """The last head (KV group where they are shared) and the last 64 neurons of every layer, as in SGTM's paper."""
    most = min(len(group) for group in anatomy.groups if group.kind == "neuron") // 4
    return anatomy.kv_groups[:, -1:] | anatomy.neurons[:, -min(FORGET_NEURONS, most) :]


def sgtm(anatomy: gs.Anatomy, model: nn.Module, strategy: Any = "mask") -> gs.Method:
    return gs.methods.sgtm(anatomy, forget_units(anatomy), strategy)


def frozen(anatomy: gs.Anatomy, share: float) -> gs.Method:
    """Freeze about this share of the model: neurons up to a half, all but neurons above."""
    small, one = min(share, 1 - share), anatomy.neurons[:, -1:].numel()  # of a neuron of every layer
    neurons = anatomy.neurons[:, -max(round(small * anatomy.space.numel() / one), 1) :]
    return gs.Method([gs.Pass("plain")], update=[gs.freeze(neurons if share < 0.5 else ~neurons)])


def tiered(anatomy: gs.Anatomy, model: nn.Module) -> gs.Method:
    return gs.methods.tiered(key_of(anatomy, of="swappable"), anatomy)


def private(anatomy: gs.Anatomy, model: nn.Module) -> gs.Method:
    return gs.methods.private_finetune(key_of(anatomy, of="swappable"), anatomy)


def opposed(anatomy: gs.Anatomy, model: nn.Module) -> gs.Method:
    return gs.methods.opposed(gs.losses.snapshot(gs.region(model, "*")))


def warp(anatomy: gs.Anatomy, model: Any) -> gs.Method:
    """Orthonormal bases drawn at random for the inputs of the MLPs' weights; entries of the coordinates held."""
    squares: dict[int, Tensor] = {}
    sites: dict[str, Site] = {}
    vectors: dict[str, Tensor | None] = {}
    for target in targets_of(model, "mlp", "benchmark"):
        key = target.name.replace("up_proj", "gate_proj")  # they read one input
        assert target.layout is not None
        sites[target.name] = Site(target.layout, key)
        if key not in vectors:
            weight = model.get_parameter(target.name)
            width = target.layout.matrices(weight).shape[-1]
            if width not in squares:
                drawn = torch.randn(width, width, device=weight.device)
                squares[width] = torch.linalg.qr(drawn).Q.to(weight.dtype).contiguous()
            vectors[key] = squares[width].clone()
    basis = Basis(ParameterSpace.of(model), "input", sites, vectors)
    masks = {n: torch.rand(basis.rotated_shape(n), device=model.device) < HELD for n in basis.sites}
    return gs.methods.warp(basis, gs.estimators.Masks.of(basis, masks))


@dataclass(frozen=True)
class Row:
    """A step to measure.

    Attributes:
        make: The method from an anatomy and its model; ``None`` for the stock step.
        labels: ``"forget"``, ``"retain"``, ``"mixed"``: which rows carry which label; ``None`` for no labels.
        streams: The method reads sub-batches: ``private`` and ``public`` are the batch each.
    """

    make: Callable[[gs.Anatomy, nn.Module], gs.Method] | None
    labels: str | None = None
    streams: bool = False


ROWS: dict[str, Row] = {
    "stock against itself": Row(None),
    "surgery without transforms": Row(lambda anatomy, model: gs.methods.plain()),
    "sgtm, retain batch": Row(sgtm, "retain"),
    "sgtm, forget batch": Row(sgtm, "forget"),
    "sgtm, mixed batch": Row(sgtm, "mixed"),
    "sgtm, detach, mixed batch": Row(lambda anatomy, model: sgtm(anatomy, model, "detach"), "mixed"),
    "sgtm, zero, mixed batch": Row(lambda anatomy, model: sgtm(anatomy, model, "zero"), "mixed"),
    "freeze 5% of the model": Row(lambda anatomy, model: frozen(anatomy, 0.05)),
    "freeze 95% of the model": Row(lambda anatomy, model: frozen(anatomy, 0.95)),
    "clip": Row(lambda anatomy, model: gs.Method([gs.Pass("plain")], [gs.clip(1.0)])),
    "tiered": Row(tiered),
    "private finetuning": Row(private, streams=True),
    "opposed, snapshot of the model": Row(opposed),
    "gru": Row(lambda anatomy, model: gs.methods.gru(), "mixed"),
    "warp, MLP weights, 10% held": Row(warp),
}


def labels_of(name: str, rows: int) -> dict[str, list[bool]]:
    """The label columns of a batch."""
    if name not in ("forget", "retain", "mixed", "none"):
        raise ValueError(f"labels are forget, retain, mixed or none, not {name!r}.")
    some = [k % 2 == 0 for k in range(rows)]
    forget = {"forget": [True] * rows, "mixed": some}.get(name, [False] * rows)
    retain = {"retain": [True] * rows, "mixed": [not flag for flag in some]}.get(name, [False] * rows)
    return {"forget": forget, "retain": retain}


def batch_of(row: Row, ids: Tensor, labels: str | None) -> Batch:
    """What the row's method reads."""
    plain: Batch = {"input_ids": ids, "labels": ids}
    if row.streams:
        return {"private": dict(plain), "public": dict(plain)}
    columns = labels_of(labels, len(ids)) if labels is not None else {}
    return {**plain, **{name: torch.tensor(flags, device=ids.device) for name, flags in columns.items()}}


class Bench:
    """The stock model of a setting, its optimizer and batch: what the rows are compared with."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = setting.build()
        self.optimizer = optimizer_of(self.model)
        self.ids = setting.ids()
        self.stock = stock_step(setting, self.model, self.optimizer, self.ids)
        self.anatomy = gs.dissect(self.model)
        self.stock()  # twins share the moments

    @contextmanager
    def candidate(self, row: Row) -> Iterator[Callable[[str | None], None]]:
        """A step of the row by labels, while its model is there."""
        if row.make is None:
            yield lambda labels: self.stock()
            return
        model, optimizer = twin(self.model, self.optimizer)
        method = row.make(self.anatomy, model)
        with gs.attach(method, self.setting.host(model), optimizer) as surgery:
            batches = {name: batch_of(row, self.ids, name) for name in labels_seen(row)}

            def step(labels: str | None) -> None:
                with self.setting.precision():
                    surgery.backward(batches[labels])
                optimizer.step()
                optimizer.zero_grad()

            yield step

    def peak(self, row: Row) -> int:
        """Bytes above model, moments and batch that attaching a method and two steps take at most."""

        def run() -> None:
            with self.candidate(row) as step:
                step(row.labels)
                step(row.labels)

        return allocated(run)

    def graphs(self, step: Callable[[str | None], None], row: Row) -> dict[str, int]:
        """Graph breaks that a compiled step adds to those of the stock one, and graphs that other labels compile.

        A count of its own: it starts with empty counters and with the stock step.
        """
        counters.clear()
        self.stock()
        stock = sum(counters["graph_break"].values())
        step(row.labels)
        breaks, graphs = sum(counters["graph_break"].values()) - stock, counters["stats"]["unique_graphs"]
        for labels in labels_seen(row):
            step(labels)
        again = counters["stats"]["unique_graphs"] - graphs
        return {"graph breaks added": breaks - stock, "recompilations": again}


def labels_seen(row: Row) -> list[str | None]:
    """The labels that a row's batches can have, its own first."""
    if row.labels is None:
        return [None]
    return [row.labels, *(name for name in ("forget", "retain", "mixed", "none") if name != row.labels)]


def refusal(bench: Bench, name: str) -> str | None:
    """Why a row makes no sense in a setting."""
    if ROWS[name].labels == "mixed" and len(bench.ids) < 2:
        return "a mixed batch takes two rows, and the batch that fits has one"
    return None


def measure(settings: list[Setting], pairs: int, only: str = "") -> tuple[str, dict[str, Any]]:
    """Every row in every setting: Markdown, and the figures."""
    texts, raw = [], {}
    for setting in settings:
        try:
            setting = setting if setting.batch else fill(setting)
            text, found = column(setting, pairs, only)
        except torch.OutOfMemoryError as error:
            setting = replace(setting, batch=setting.batch or LEAST)
            text, found = f"{setting.describe()}: {sentence(error)}.", {"why not": sentence(error)}
        texts.append(text)
        raw[setting.describe()] = found
        release()
    return "\n\n".join(texts), raw


def column(setting: Setting, pairs: int, only: str = "") -> tuple[str, dict[str, Any]]:
    """All rows in one setting."""
    if setting.compile:
        torch.compiler.reset()
    bench = Bench(setting)
    base = allocated(bench.stock)
    lines: list[dict[str, Any]] = []
    raw: dict[str, Any] = {"setting": vars(setting), "stock peak bytes": base}
    for name in (name for name in ROWS if re.search(only, name)):
        try:
            why = refusal(bench, name)
            found: dict[str, Any] = {"why not": why} if why else row_of(bench, ROWS[name], pairs)
        except (torch.OutOfMemoryError, GradsurgeryError, RuntimeError) as error:
            found = {"why not": sentence(error)}
        bench.optimizer.zero_grad()
        release()
        raw[name] = found
        if "why not" not in found:
            lines.append(line_of(name, found, base))
    parameters = sum(p.numel() for p in bench.model.parameters())
    rows = {name: found for name, found in raw.items() if name in ROWS}
    missing = [f"Not measured: {name}: {found['why not']}." for name, found in rows.items() if "why not" in found]
    seconds = [found["stock seconds"] for found in rows.values() if "stock seconds" in found]
    taken = f"{statistics.median(seconds):.3f} s (median), " if seconds else ""
    head = (
        f"{setting.describe()}, {parameters / 1e6:,.1f} M parameters. Stock step: {taken}{base / 2**20:,.0f} MiB at "
        f"its peak above model, moments and batch. Ratios to those around each of {pairs} runs."
    )
    return "\n\n".join(filter(None, [head, table(lines, "markdown"), *missing])), raw


def row_of(bench: Bench, row: Row, pairs: int) -> dict[str, Any]:
    """Ratios and peak memory of a row; of a compiled one also what it adds to the graphs."""
    compiled = bench.setting.compile
    if compiled:
        torch.compiler.reset()  # every row from the start: entries of earlier ones would add up to dynamo's limit
    with bench.candidate(row) as step:
        found: dict[str, Any] = bench.graphs(step, row) if compiled else {}
        ratios, seconds = interleaved(bench.stock, {"row": lambda: step(row.labels)}, pairs)
        found.update({"ratios": ratios["row"].values, "stock seconds": seconds})
        if compiled:  # of a step alone: attaching again would compile anew
            return {**found, "peak bytes": allocated(lambda: step(row.labels))}
    return {**found, "peak bytes": bench.peak(row)}


def line_of(name: str, found: Mapping[str, Any], base: int) -> dict[str, Any]:
    """A line of the table."""
    values = found["ratios"]
    return {
        "step": name,
        "ratio": statistics.median(values),
        "range": f"{min(values):.3f} to {max(values):.3f}",
        "peak MiB": found["peak bytes"] / 2**20,
        "peak of stock": found["peak bytes"] / base,
        **{what: found[what] for what in ("graph breaks added", "recompilations") if what in found},
    }


def sentence(error: BaseException) -> str:
    """Why something was not measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in memory"
    text = str(error).strip().split("\n")[0]
    return f"refused ({type(error).__name__}): {text}" if isinstance(error, GradsurgeryError) else f"fails: {text}"
