"""The functional acceptance test of an anatomy, on the model as given: slow, obvious, and not the engine's own code."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.groups import UnitGroup

Slices = Sequence[tuple[str, dict[int, tuple[int, ...]]]]


class Checker:
    """Tensors and outputs of one model.

    Args:
        model: In eval mode; float64 where its forward allows it.
        outputs: Runs it on fixed inputs.
        tolerance: Relative change below which outputs are equal: what the model's own float32 parts show.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[nn.Module], Tensor], tolerance: float) -> None:
        self.model, self.outputs, self.tolerance = model, outputs, tolerance
        self.buffers = dict(model.named_buffers())
        self.tensors = dict(model.named_parameters()) | self.buffers
        self.base = self.run()

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.outputs(self.model).detach().double()

    def change(self, other: Tensor | None = None) -> float:
        now = self.run()
        base = self.base if other is None else other
        return float((now - base).abs().max() / base.abs().mean())

    def view(self, name: str, index: dict[int, tuple[int, ...]]) -> tuple[Tensor, tuple]:
        tensor = self.tensors[name]
        dims = sorted(index)
        mesh = torch.meshgrid(*(torch.tensor(index[d]) for d in dims), indexing="ij") if dims else ()
        return tensor.movedim(dims, list(range(len(dims)))) if dims else tensor, tuple(mesh) if dims else (...,)

    @torch.no_grad()
    def swap(self, one: Slices, other: Slices) -> None:
        for (name_a, index_a), (name_b, index_b) in zip(one, other, strict=True):
            (a, here), (b, there) = self.view(name_a, index_a), self.view(name_b, index_b)
            first, second = a[here].clone(), b[there].clone()
            a[here], b[there] = second, first

    @torch.no_grad()
    def fill(self, unit: Slices, noise: torch.Generator | None) -> None:
        for name, index in unit:
            view, here = self.view(name, index)
            values = torch.zeros_like(view[here]) if noise is None else torch.randn(view[here].shape, generator=noise)
            if name in self.buffers:  # some are variances
                values = view[here] + values.abs()
            view[here] = values.to(view.dtype)

    def reaches(self, group: UnitGroup) -> bool:
        """Whether anything about the group shows in the outputs for these inputs."""
        noise = torch.Generator().manual_seed(0)

        def overwritten() -> float:
            for unit in group.units:
                self.fill(unit, noise)
            return self.change()

        return self.restored(overwritten) > 1e-9

    def restored(self, action: Callable[[], float]) -> float:
        saved = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        result = action()
        with torch.no_grad():
            for name, values in saved.items():
                self.tensors[name].copy_(values)
        return result


def check_group(checker: Checker, group: UnitGroup, pairs: int = 2) -> list[str]:
    """Everything wrong with one group; empty if nothing is."""
    wrong: list[str] = []
    units, consumers = list(group.units), list(group.consumers)
    members = defaultdict(list)
    for unit, label in enumerate(group.exchange_classes):
        members[label].append(unit)
    picks = [(c[0], c[k]) for c in members.values() for k in {1, len(c) - 1} if len(c) > 1][:pairs]
    for a, b in picks:
        before = {n: t.detach().clone() for n, t in checker.tensors.items()}
        checker.swap(units[a], units[b])
        quiet = checker.change()
        if not quiet < checker.tolerance:
            wrong.append(f"swap {a},{b} changes the output by {quiet:.1e}")
        checker.swap(units[a], units[b])
        if not all(torch.equal(t, before[n]) for n, t in checker.tensors.items()):
            wrong.append(f"swapping {a},{b} twice is not the identity")

        def alone(a: int = a, b: int = b) -> float:
            checker.swap(consumers[a], consumers[b])
            return checker.change()

        def rolled() -> float:
            for one, other in itertools.pairwise(range(len(units))):
                checker.swap(consumers[one], consumers[other])
            return checker.change()

        least = max(10 * quiet, 1e-9)  # early channels of a deep network are heard faintly
        heard = checker.restored(alone) > least
        if not heard:  # a pair that clips on every token, or an expert that none of the few tokens chose
            heard = checker.restored(rolled) > least
        heard = heard or any(
            checker.restored(partial(_revived, checker, group, a, b, seed)) > least for seed in range(3)
        )
        if not heard and (group.kind == "expert" or ".experts." in group.name):
            heard = not checker.reaches(group)
        if not heard:
            wrong.append(f"consumers of {a},{b} are not heard")
    if picks and not checker.restored(lambda: _shuffle(checker, units, members.values())) < checker.tolerance:
        wrong.append("a permutation inside the classes changes the output")
    if len(members) > 1:
        a, b = (c[0] for c in itertools.islice(members.values(), 2))

        def across() -> float:
            checker.swap(units[a], units[b])
            return checker.change()

        if not checker.restored(across) > checker.tolerance:
            wrong.append(f"units {a} and {b} of different classes can be swapped")
    if not _disjoint(units):
        wrong.append("units overlap")
    if group.closed != _closed(checker, group, units, consumers) and group.kind != "expert":
        wrong.append(f"closed={group.closed} is not so")
    return wrong


def _revived(checker: Checker, group: UnitGroup, a: int, b: int, seed: int) -> float:
    """How much the consumers of two units matter while their producers are others: few clip whatever these are."""
    noise = torch.Generator().manual_seed(seed)
    slots = [k for k in range(len(group.footprints)) if k not in group.consumer_slots]
    for unit in (group.units[a], group.units[b]):
        checker.fill([unit[k] for k in slots], noise)
    base = checker.run()
    checker.swap(group.consumers[a], group.consumers[b])
    return checker.change(base)


def _shuffle(checker: Checker, units: Sequence[Slices], classes: Iterable[list[int]]) -> float:
    for members in classes:
        for a, b in itertools.pairwise(members):
            checker.swap(units[a], units[b])
    return checker.change()


def _disjoint(units: Sequence[Slices]) -> bool:
    seen: set = set()
    for unit in units:
        for name, index in unit:
            cells = {(name, *cell) for cell in itertools.product(*(index[d] for d in sorted(index)))}
            if cells & seen:
                return False
            seen |= cells
    return True


def _closed(checker: Checker, group: UnitGroup, units: Sequence[Slices], consumers: Sequence[Slices]) -> bool:
    noise = torch.Generator().manual_seed(0)
    chosen = range(0, len(units), 2)

    def compare() -> float:
        for unit in chosen:
            checker.fill(consumers[unit], None)
        ablated = checker.run()
        slots = [k for k in range(len(group.footprints)) if k not in group.consumer_slots]
        for unit in chosen:
            checker.fill([units[unit][k] for k in slots], noise)
        return checker.change(ablated)

    return checker.restored(compare) < checker.tolerance


def check_layers(checker: Checker, groups: Sequence[UnitGroup]) -> list[str]:
    """Swapping a unit between two layers must change the output."""
    wrong = []
    places = defaultdict(list)
    for group in groups:
        if isinstance(group.footprints[0].name, str) and len(group) > 1:
            shapes = tuple(
                (tuple(checker.tensors[str(f.name)].shape), tuple((d, v.shape[1]) for d, v in f.index.items()))
                for f in group.footprints
            )
            places[group.kind, shapes].append(group)
    for (kind, _), alike in places.items():
        if len(alike) > 1:

            def across(count: int, alike: list[UnitGroup] = alike) -> float:
                for one, other in list(zip(alike[0].units, alike[-1].units, strict=False))[:count]:
                    checker.swap(one, other)
                return checker.change()

            # all of them where one alone is silent: an expert that none of the few tokens chose
            heard = any(checker.restored(partial(across, n)) > 1e-9 for n in (1, len(alike[0])))
            if not heard and all(checker.reaches(g) for g in alike):
                wrong.append(f"{kind}s of {alike[0].name} and {alike[-1].name} can be swapped")
    return wrong


def uncovered(model: nn.Module, groups: Sequence[UnitGroup], structural: dict[str, str]) -> list[str]:
    """Parameters that are neither in a unit nor explained."""
    held: set[str] = set()
    for group in groups:
        for footprint in group.footprints:
            held.update([footprint.name] if isinstance(footprint.name, str) else footprint.name)
    return [name for name, _ in model.named_parameters() if name not in held and name not in structural]


def check(
    model: nn.Module, outputs: Callable, groups: Sequence[UnitGroup], structural: dict[str, str], tolerance: float
) -> list[str]:
    """Everything wrong with the units found in ``model``."""
    checker = Checker(model, outputs, tolerance)
    wrong = [f"{name}: in no unit and unexplained" for name in uncovered(model, groups, structural)]
    for group in groups:
        wrong += [f"{group!r}: {problem}" for problem in check_group(checker, group)]
    return wrong + check_layers(checker, groups)
