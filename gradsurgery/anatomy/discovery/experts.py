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

from .draft import Draft, Slot
from .verify import Judge


def expert_drafts(drafts: list[Draft], tensors: dict[str, Tensor], buffers: set[str], judge: Judge) -> list[Draft]:
    """Verified expert groups; the neuron drafts are returned with their expert's number first."""
    taken = {s.name for d in drafts for s in d.slots}
    found: list[Draft] = []
    used: set[int] = set()
    for members, slots, scopes in list(_families(drafts, tensors)):
        if any(id(member) in used for member in members):
            continue
        for scope in scopes:
            units = _with_router(len(members), slots, scope, taken, tensors, buffers, judge)
            if units is not None:
                numbers = {id(member): number for number, member in enumerate(members)}
                used |= numbers.keys()
                for place, draft in enumerate(drafts):
                    if id(draft) in numbers:
                        drafts[place] = replace(draft, expert=numbers[id(draft)])
                found.append(units)
                break
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
            members.sort(key=lambda d: [int(v.min()) for _, v in sorted(d.slots[0].index.items())])
            scope = common_module([str(s.name) for s in members[0].slots])
            yield members, _slices(members, tensors), _ancestors(scope, members[0].block)
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


def _with_router(
    count: int,
    slots: list[Slot],
    scope: str,
    taken: set,
    tensors: dict[str, Tensor],
    buffers: set[str],
    judge: Judge,
) -> Draft | None:
    """The experts with the fewest left-out candidates that survive a swap, and their exchange classes."""
    own = {n for s in slots for n in ([s.name] if isinstance(s.name, str) else s.name)}
    exact: list[Slot] = []
    longer: list[Slot] = []
    for name, tensor in tensors.items():
        if not name.startswith(scope + ".") or name in own or name in taken:
            continue
        dims = [d for d in range(tensor.ndim) if tensor.shape[d] == count]
        lines = np.arange(count)[:, None]
        if dims:
            exact.append(Slot(name, {dims[0]: lines}, "router", name in buffers))
        elif (tensor.ndim == 2 and tensor.shape[0] > count) or (tensor.ndim == 1 and tensor.shape[0] > count):
            longer.append(Slot(name, {0: lines}, "router", name in buffers))
    for extra in _choices(exact, longer):
        draft = Draft("expert", scope, (*slots, *extra), count, closed=False)
        for pair in ((0, 1), (0, count - 1)):
            if judge.swaps(draft, *pair):
                whole = replace(draft, classes=(0,) * count)
                if judge.exchange([whole])[0]:
                    return whole
                return replace(draft, classes=judge.classes(draft))
    return None


def _choices(exact: list[Slot], longer: list[Slot]) -> Iterator[tuple[Slot, ...]]:
    """Candidates to move along, most first; longer tensors only after those of the experts' number."""
    for pool in (exact, [*exact, *longer]):
        for size in range(min(len(pool), 6), 0, -1):
            yield from combinations(pool[:6], size)
