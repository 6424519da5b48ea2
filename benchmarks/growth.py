"""How costs grow, measured: with units, row classes, swaps, bytes, directions, scopes, model size; and checkpoints."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gradsurgery as gs
from benchmarks.columns import labels_of
from benchmarks.keys import toggle
from benchmarks.models import CONFIGS, Run, Setting, empty, llama, optimizer_of, release, stock_step
from benchmarks.timing import interleaved, seconds
from gradsurgery.errors import KeyWarning

Line = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large the measured cases are.

    Attributes:
        model: Of steps, projections and checkpoints, in `benchmarks.models.CONFIGS`.
        keyed: Of keys that grow.
        batch: Rows of a step.
        swapped: Entries of a residual stream, times swaps, that keys of few and many swaps have in common.
        swaps: Their numbers of swaps.
        fractions: Shares of the swappable entries that growing keys move.
        directions: Numbers of directions of a projection.
        dissected: Models that are dissected without weights.
        pairs: Counted runs of each.
    """

    model: str = "17m"
    keyed: str = "34m"
    batch: int = 8
    swapped: int = 1_600_000
    swaps: tuple[int, ...] = (100, 1000, 10_000)
    fractions: tuple[float, ...] = (0.01, 0.05, 0.2, 0.5)
    directions: tuple[int, ...] = (1, 2, 4, 8, 16)
    dissected: tuple[str, ...] = ("1m", "17m", "254m", "1b", "8b", "70b")
    pairs: int = 5


TINY = Size("tiny", "tiny", 4, 800, (2, 10), (0.2, 0.5), (1, 2), dissected=("tiny", "1m"), pairs=1)


@dataclass
class Step:
    """A model with a stock step, to compare the same model's under a method with."""

    setting: Setting

    def __post_init__(self) -> None:
        self.model = self.setting.build()
        self.optimizer = optimizer_of(self.model)
        self.ids = self.setting.ids()
        self.anatomy = gs.dissect(self.model)

    def stock(self) -> Run:
        return stock_step(self.setting, self.model, self.optimizer, self.ids)

    def under(self, method: gs.Method, columns: Mapping[str, list[bool]]) -> Run:
        surgery = gs.attach(method, self.model, self.optimizer)
        flags = {name: torch.tensor(column, device=self.ids.device) for name, column in columns.items()}

        def run() -> None:
            surgery.backward({"input_ids": self.ids, "labels": self.ids, **flags})
            self.optimizer.step()
            self.optimizer.zero_grad()

        return run


def step_ratio(size: Size, device: str, make: Callable[[gs.Anatomy], gs.Method], columns: Any) -> float:
    """Median ratio of a step under a method to the stock step."""
    setting = Setting.of(size.model, device, batch=size.batch, tokens=128 if size.model != "tiny" else 0)
    run = Step(setting)
    ratios, _ = interleaved(Step(setting).stock(), {"step": run.under(make(run.anatomy), columns)}, size.pairs)
    return ratios["step"].median


def units(size: Size, device: str) -> list[Line]:
    """An SGTM step of the 17M GPT-Neo, half of the rows forget, half retain, against the stock step: so many heads or
    neurons of every layer belong to the forget data, the others are masked. What is masked is not computed.
    """
    anatomy = gs.dissect(empty(size.model))
    lines = []
    for kind in ("heads", "neurons"):
        count = min(len(g) for g in anatomy.groups if g.kind == kind[:-1])
        for chosen in sorted({1, count // 4, count // 2, count - 1}):

            def sgtm(anatomy: gs.Anatomy, kind: str = kind, chosen: int = chosen) -> gs.Method:
                return gs.methods.sgtm(anatomy, getattr(anatomy, kind)[:, -chosen:])

            ratio = step_ratio(size, device, sgtm, labels_of("mixed", size.batch))
            lines.append({"kind": kind, "units a layer": chosen, "of": count, "ratio to stock": ratio})
    return lines


def classes(size: Size, device: str) -> list[Line]:
    """A step of the same model in which every class of rows is kept from an eighth of the neurons, each from another,
    against the stock step.
    """
    most = size.batch
    lines = []
    for count in (n for n in (1, 2, 4, 8) if n <= most):

        def masks(anatomy: gs.Anatomy, count: int = count) -> gs.Method:
            width = min(len(g) for g in anatomy.groups if g.kind == "neuron") // most
            under = [gs.mask(anatomy.neurons[:, k * width : (k + 1) * width], where=f"class{k}") for k in range(count)]
            return gs.Method([gs.Pass("classes", under=under)])

        columns = {f"class{k}": [row % count == k for row in range(most)] for k in range(count)}
        lines.append({"classes of rows": count, "ratio to stock": step_ratio(size, device, masks, columns)})
    return lines


def key_ratio(model: Any, key: gs.PermutationKey, pairs: int) -> Line:
    """A key applied and taken back, against two plain copies of the bytes that it touches; bytes a second, each way."""
    anatomy = gs.dissect(model)
    source = torch.randn(key.region(anatomy).numel(), device=model.device)
    copy = torch.empty_like(source)

    def plain() -> None:
        copy.copy_(source)
        copy.copy_(source)

    ratios, copied = interleaved(plain, {"key": toggle(key, model, anatomy)}, 4 * pairs)  # these are short
    ratio = ratios["key"].median
    size = source.numel() * source.element_size()
    return {"swaps": len(key), "MB": size / 1e6, "ratio to copies": ratio, "GB/s": 2 * size / (ratio * copied) / 1e9}


def swaps(size: Size, device: str) -> list[Line]:
    """Neurons of ever narrower models, ever more of them: the same bytes in few large and in many small swaps. A key is
    applied and taken back, against two plain copies of the bytes that it touches.
    """
    lines = []
    for count in size.swaps:
        width = size.swapped // count
        neurons = count * 5 // 2  # a layer, of four: a fifth of all changes places
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(llama(4, width, neurons, 2, 2, 8, vocabulary=64))
        lines.append({"width": width, **key_ratio(model, crossed(neurons, count), size.pairs)})
        del model
        release()
    return lines


def crossed(neurons: int, count: int) -> gs.PermutationKey:
    """So many swaps of neurons drawn at random, half of them between layers 0 and 1, half between 2 and 3."""
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(neurons, generator=generator)[: count // 2].tolist() for _ in range(4)]
    pairs = [(layer, a, b) for layer in (0, 2) for a, b in zip(chosen[layer], chosen[layer + 1], strict=True)]
    return gs.PermutationKey(mlp_cols=[[[layer, a], [layer + 1, b]] for layer, a, b in pairs])


def bytes_(size: Size, device: str) -> list[Line]:
    """Keys of ever larger shares of the neurons and heads of the 34M GPT-Neo, as above."""
    warnings.simplefilter("ignore", KeyWarning)  # heads move between global and local layers
    model: Any = Setting.of(size.keyed, device).build()
    anatomy = gs.dissect(model)
    drawn = {share: gs.PermutationKey.generate(anatomy, share, seed=0) for share in size.fractions}
    return [{"share": share, **key_ratio(model, key, size.pairs)} for share, key in drawn.items()]


@dataclass(frozen=True)
class Directions:
    """Stored gradients, drawn at random."""

    vectors: list[dict[str, Tensor]]

    @classmethod
    def drawn(cls, model: nn.Module, count: int) -> Directions:
        return cls([{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(count)])


def projections(size: Size, device: str) -> list[Line]:
    """``surgery.finish()`` with one projection, alone, against a copy of the gradient of the 17M GPT-Neo: directions
    for the whole model, scopes for one direction. With more than one, sums are fp64 and every pair of vectors has one.
    """
    cases = [(count, "global") for count in size.directions] + [(1, scope) for scope in ("module", "tensor", "row")]
    lines = []
    for count, scope in cases:
        model = Setting.of(size.model, device).build()
        memory = Directions.drawn(model, count)
        surgery = gs.attach(gs.Method([gs.Pass("p")], [gs.project("main", memory, scope=scope)]), model)  # type: ignore[arg-type]
        ids = torch.zeros(1, 8, dtype=torch.long, device=device)
        taken, ratios = [], []
        for k in range(1 + size.pairs):
            surgery.backward({"input_ids": ids, "labels": ids})
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            copies = [grad.clone() for grad in grads]  # their pages are there
            copied = seconds(lambda: torch._foreach_copy_(copies, grads))  # noqa: B023
            finished = seconds(surgery.finish)
            model.zero_grad()
            if k:
                taken.append(finished)
                ratios.append(finished / copied)
        surgery.remove()
        lines.append(
            {
                "directions": count,
                "scope": scope,
                "ms": 1e3 * statistics.median(taken),
                "ratio to a copy": statistics.median(ratios),
            }
        )
        del model, memory, surgery
        release()
    return lines


def dissections(size: Size, device: str) -> list[Line]:
    """``gs.dissect`` of models without weights."""
    lines = []
    for name in size.dissected:
        model = empty(name)
        taken = []
        for _ in range(max(size.pairs // 2, 1)):
            start = time.perf_counter()
            anatomy = gs.dissect(model)
            taken.append(time.perf_counter() - start)
        parameters, units = sum(p.numel() for p in model.parameters()), sum(map(len, anatomy.groups))
        lines.append({"model": name, "parameters, M": parameters / 1e6, "units": units, "s": statistics.median(taken)})
    return lines


def checkpoints(size: Size, device: str) -> list[Line]:
    """Weights and moments of the 17M GPT-Neo to the disk and back (a file that was just written is read from memory),
    against a copy of the files that waits for the disk too.
    """
    step = Step(Setting.of(size.model, device, batch=1))
    step.stock()()
    surgery = gs.attach(gs.methods.plain(), step.model, step.optimizer)
    saved, copied, loaded, held = [], [], [], 0
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        for k in range(1 + size.pairs):
            folder = Path(directory, str(k))
            start = time.perf_counter()
            path = gs.save_checkpoint(folder, surgery)
            mid = time.perf_counter()
            shutil.copytree(path, folder / "copy")
            for part in files(folder / "copy"):
                with open(part, "rb") as written:
                    os.fsync(written.fileno())
            end = time.perf_counter()
            gs.load_checkpoint(path, surgery)
            last = time.perf_counter()
            held = sum(part.stat().st_size for part in files(path))
            if k:
                saved.append(mid - start)
                copied.append(end - mid)
                loaded.append(last - end)
            shutil.rmtree(folder)
    medians = {"save": saved, "copy of the files": copied, "load": loaded}
    speeds = {what: held / statistics.median(taken) / 1e6 for what, taken in medians.items()}
    return [
        {"": what, "MB": held / 1e6, "MB/s": s, "of a copy": s / speeds["copy of the files"]}
        for what, s in speeds.items()
    ]


def files(folder: Path) -> Iterator[Path]:
    return (part for part in folder.rglob("*") if part.is_file())


SECTIONS: dict[str, Callable[[Size, str], list[Line]]] = {
    "Units": units,
    "Classes of rows": classes,
    "Swaps of the same bytes": swaps,
    "Keys that grow": bytes_,
    "Directions and scopes": projections,
    "Dissecting": dissections,
    "Checkpoints on this machine": checkpoints,
}


def measure(size: Size, device: str, only: Callable[[str], bool] = lambda title: True) -> dict[str, list[Line]]:
    """By section, its lines."""
    assert all(name in CONFIGS for name in (size.model, size.keyed, *size.dissected))
    return {title: make(size, device) for title, make in SECTIONS.items() if only(title)}
