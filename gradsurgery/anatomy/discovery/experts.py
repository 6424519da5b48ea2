"""Mixtures of experts: which neuron groups are experts of one layer, and which router rows belong to them.

Experts are alike and run side by side: parts of the same tensors, or elements of one ``ModuleList``. Router rows,
biases and correction buffers are the tensors nearby that have one line an expert; a swap test decides which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
from torch import Tensor

from gradsurgery.errors import AnatomyError

from .draft import Draft, Slot
from .names import canonical_of
from .tables import hold_renumbered
from .verify import Judge

_TRIALS = 4
"""Permutations of all experts that must pass: where tokens agree, one may leave their choice alone by chance."""
_MOST = 4
"""Candidates that are tried in every combination, where not all of them move with the experts."""


Tables = dict[str, tuple[Tensor, int]]


class Unreached(AnatomyError):
    """Some experts met too few tokens to be judged; more of them may do."""


def expert_drafts(
    drafts: list[Draft], tensors: dict[str, Tensor], buffers: set[str], judge: Judge, tables: Tables
) -> list[Draft]:
    """Verified expert groups; the neuron drafts are returned with their expert's number first.

    ``tables``: see ``tables_of``.
    """
    taken = {(s.name, dim) for d in drafts for s in d.slots for dim in s.index}
    found: list[Draft] = []
    used: set[int] = set()
    for members, slots, scopes in list(_families(drafts, tensors)):
        _require_all(members, slots, tensors)
        if any(id(member) in used for member in members):
            continue
        pools = [(scope, *_candidates(len(members), slots, scope, taken, tensors, buffers)) for scope in scopes]
        units = _with_router(len(members), slots, pools, judge, tables)
        if units is None:
            continue
        _require_siblings(units, tensors)
        numbers = {id(member): number for number, member in enumerate(members)}
        used |= numbers.keys()
        for place, draft in enumerate(drafts):
            if id(draft) in numbers:
                drafts[place] = replace(draft, expert=numbers[id(draft)])
        found.append(units)
    return found


def _families(drafts: list[Draft], tensors: dict[str, Tensor]) -> Iterator[tuple[list[Draft], list[Slot], list[str]]]:
    """``(neuron drafts by expert, slots of the experts, modules to look for a router in)``."""
    shared: dict[tuple, list[Draft]] = {}
    listed: dict[tuple, list[Draft]] = {}
    for draft in drafts:
        if draft.kind != "neuron":
            continue
        shared.setdefault((draft.block, *(s.name for s in draft.slots)), []).append(draft)
        head = draft.block.rstrip("0123456789")
        if head != draft.block and any(part.isdigit() for part in head.split(".")):
            relative = tuple(str(s.name)[len(draft.block) :] for s in draft.slots)
            listed.setdefault((head, draft.count, *relative), []).append(draft)
    for members in shared.values():
        if len(members) > 1:
            members.sort(key=_first_line)
            scope = common_module([str(s.name) for s in members[0].slots])
            slots = _slices(members, tensors)
            yield members, [*slots, *_ranks(members, slots, drafts, tensors)], _ancestors(scope, members[0].block)
    for (head, *_), members in listed.items():
        if len(members) > 1:
            blocks = [d.block for d in members]
            inner = sorted(n[len(blocks[0]) :] for n in tensors if n.startswith(blocks[0] + "."))
            if all(f"{b}{n}" in tensors for b in blocks for n in inner) and "." in head:
                slots = [Slot(tuple(b + n for b in blocks), {}, _role(members[0], blocks[0] + n)) for n in inner]
                around = (
                    head.rpartition(".")[0].rpartition(".")[0]
                    if not head.endswith(".")
                    else head[:-1].rpartition(".")[0]
                )
                yield members, slots, [around]


def _slices(members: list[Draft], tensors: dict[str, Tensor]) -> list[Slot]:
    slots = []
    for k, slot in enumerate(members[0].slots):
        index = {}
        for dim in slot.index:
            rows = np.stack([np.unique(m.slots[k].index[dim]) for m in members])
            if rows.shape[1] < tensors[str(slot.name)].shape[dim]:
                index[dim] = rows
        slots.append(replace(slot, index=index))
    return slots


def _ranks(members: list[Draft], slots: list[Slot], drafts: list[Draft], tensors: dict[str, Tensor]) -> list[Slot]:
    """What an adapter of the experts adds to them: ranks of their own, as many groups as there are experts."""
    families: dict[tuple, list[Draft]] = {}
    for draft in drafts:
        if draft.kind == "latent" and draft.block == members[0].block:
            families.setdefault(tuple(s.name for s in draft.slots), []).append(draft)
    found: dict[str, Slot] = {}
    for family in families.values():
        if len(family) == len(members):
            family.sort(key=_first_line)
            found.update((str(slot.name), slot) for slot in _slices(family, tensors))
    return [slot for name, slot in found.items() if all(name != own.name for own in slots)]


def _first_line(draft: Draft) -> list[int]:
    return [int(rows.min()) for _, rows in sorted(draft.slots[0].index.items())]


def _role(draft: Draft, name: str) -> str:
    return next((s.role for s in draft.slots if s.name == name), "producer")


def common_module(names: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    same = 0
    while all(len(p) > same for p in parts) and len({p[same] for p in parts}) == 1:
        same += 1
    return ".".join(parts[0][:same])


def _ancestors(scope: str, block: str) -> list[str]:
    """``scope`` and the modules around it, up to the block."""
    found = [scope]
    while scope != block and "." in scope and len(scope) > len(block):
        scope = scope.rpartition(".")[0]
        found.append(scope)
    return found


def _require_all(members: list[Draft], slots: list[Slot], tensors: dict[str, Tensor]) -> None:
    """Raise where a stacked tensor holds more experts than the inputs reached."""
    for slot in slots:
        for dim, rows in slot.index.items() if isinstance(slot.name, str) and slot.role == "consumer" else ():
            size = tensors[str(slot.name)].shape[dim]
            if len(rows) == len(members) and len(np.unique(rows)) == rows.size < size:
                raise Unreached(
                    f"{slot.name} holds {size // rows.shape[1]} experts, of which the example inputs reached "
                    f"{len(members)}: pass inputs with more tokens, gs.dissect(model, inputs)."
                )


def _require_siblings(units: Draft, tensors: dict[str, Tensor]) -> None:
    """Raise where a list holds more elements like the experts than those."""
    names = units.slots[0].name
    if isinstance(names, str):
        return
    alike = [n for n in tensors if canonical_of(n) == canonical_of(names[0]) and n not in names]
    around = common_module(list(names))
    alike = [n for n in alike if n.startswith(around + ".") and tensors[n].shape == tensors[names[0]].shape]
    if alike:
        raise Unreached(
            f"{around} holds {len(names) + len(alike)} experts, of which the example inputs reached {len(names)}: pass "
            "inputs with more tokens, gs.dissect(model, inputs)."
        )


def _candidates(
    count: int, slots: list[Slot], scope: str, taken: set, tensors: dict[str, Tensor], buffers: set[str]
) -> tuple[list[Slot], dict[int, list[Slot]]]:
    """Slots inside ``scope`` with one line an expert, and by their size those with more: experts that do nothing."""
    own = {n for s in slots for n in ([s.name] if isinstance(s.name, str) else s.name)}
    exact: list[Slot] = []
    longer: dict[int, list[Slot]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(scope + ".") or name in own:
            continue
        dims = [d for d in range(tensor.ndim) if tensor.shape[d] == count and (name, d) not in taken]
        lines = np.arange(count)[:, None]
        if dims:
            exact.append(Slot(name, {dims[0]: lines}, "router", name in buffers))
        elif tensor.ndim in (1, 2) and count < tensor.shape[0] <= 2 * count and (name, 0) not in taken:
            longer.setdefault(tensor.shape[0], []).append(Slot(name, {0: lines}, "router", name in buffers))
    return exact, longer


_Pools = list[tuple[str, list[Slot], dict[int, list[Slot]]]]


def _with_router(count: int, slots: list[Slot], pools: _Pools, judge: Judge, tables: Tables) -> Draft | None:
    """The experts with what moves along, and their exchange classes; everything nearby first, then less of it."""
    for choices in (_everything, _something):
        drafts = [
            Draft("expert", scope, (*slots, *extra), count, closed=False)
            for scope, exact, longer in pools
            for extra in choices(exact, longer)
        ]
        for draft in drafts:
            if all(judge.exchange([draft])[0] for _ in range(_TRIALS)):
                return replace(draft, classes=(0,) * count)
        for draft in drafts:  # experts in router groups are exchangeable within their group
            if any(judge.swaps(draft, *pair) for pair in ((0, 1), (0, count - 1))):
                return replace(draft, classes=judge.classes(draft))
        for draft in drafts:  # and those that a table chooses are not
            if all(hold_renumbered(draft, tables, judge) for _ in range(_TRIALS)):
                return replace(draft, classes=tuple(range(count)))
    return None


def _everything(exact: list[Slot], longer: dict[int, list[Slot]]) -> Iterator[tuple[Slot, ...]]:
    yield from (tuple(pool) for pool in (exact, *([*exact, *longer[size]] for size in sorted(longer))) if pool)


def _something(exact: list[Slot], longer: dict[int, list[Slot]]) -> Iterator[tuple[Slot, ...]]:
    for pool in (exact, *([*exact, *longer[size]] for size in sorted(longer))):
        for size in range(min(len(pool) - 1, _MOST), 0, -1):
            yield from combinations(pool[:_MOST], size)
