"""Slots of real models, draws of keys over them, and the slow way to swap what a key names."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.anatomy.groups import Slice, UnitGroup
from tests.transforms.cases import case

#: One architecture of each layout that keys meet.
ARCHITECTURES = {
    "gpt_neo": "separate projections, alternating windows",
    "gpt2": "Conv1D, fused by concatenation",
    "gpt_neox": "fused, interleaved by head",
    "llama": "grouped queries",
    "qwen3": "a norm per head",
    "phi3": "fused projections and fused gate",
    "opt": "biases everywhere",
    "bloom": "ALiBi, fused, interleaved",
    "falcon_old": "one key for all heads",
    "mixtral": "fused experts, routers",
    "gpt_oss": "sinks, interleaved experts with biases",
    "deepseek_v3": "latent attention, dense and routed layers",
    "t5": "encoder and decoder, cross attention",
    "vit": "patches",
    "mamba2": "heads of a state space",
}
HALVES = {
    "attn_heads": ("head", None),
    "mlp_cols": ("neuron", None),
    "experts": ("expert", None),
    "attn_out_heads": ("head", True),
    "mlp_up_cols": ("neuron", False),
    "mlp_down_cols": ("neuron", True),
}
"""By list: the kind of its units, and whether consumers, the others, or all slices move."""


@dataclass(frozen=True)
class Slot:
    """Unit ``index`` of ``layer``, and its slices in the order of their names."""

    kind: str
    layer: int
    index: int
    slices: tuple[Slice, ...]
    consumer: tuple[bool, ...]
    shape: tuple[Any, ...]
    class_: tuple[Any, ...]

    @property
    def at(self) -> list[int]:
        return [self.layer, self.index]

    def part(self, consumers: bool | None) -> list[Slice]:
        both = zip(self.slices, self.consumer, strict=True)
        return [slice_ for slice_, consumes in both if consumers is None or consumes == consumers]


@functools.cache
def slots(name: str) -> tuple[Slot, ...]:
    """Every slot of a model of the zoo."""
    return slots_of(case(name).anatomy, case(name).model)


def slots_of(anatomy: gs.Anatomy, model: nn.Module) -> tuple[Slot, ...]:
    """Every slot of a model, counted as the design page says; KV groups for heads that share."""
    out = []
    shapes = {n: tuple(t.shape) for n, t in tensors_of(model).items()}
    counts: dict[tuple[str, int], int] = {}
    for group in anatomy.groups:
        if group.kind not in ("head", "neuron", "expert"):
            continue
        whole: UnitGroup = anatomy.parent_of(group) if group.parent is not None else group
        for k in range(len(whole)):
            order = sorted(range(len(whole.footprints)), key=lambda f: _order(whole, f, k))
            slices = tuple(whole.units[k][f] for f in order)
            shape = tuple(
                tuple(len(index[d]) if d in index else n for d, n in enumerate(shapes[n_])) for n_, index in slices
            )
            index = counts.get((group.kind, group.layer), 0)
            counts[group.kind, group.layer] = index + 1
            consumer = tuple(f in whole.consumer_slots for f in order)
            class_ = (group.name, whole.exchange_classes[k])
            out.append(Slot(group.kind, group.layer, index, slices, consumer, shape, class_))
    return tuple(out)


def _order(group: UnitGroup, footprint: int, unit: int) -> tuple[str, int]:
    return re.sub(r"\d+", "#", group.footprints[footprint].name_of(unit)), footprint


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters under every name, and buffers."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers())}


def slow_(tensors: Mapping[str, Tensor], known: str | tuple[Slot, ...], key: gs.PermutationKey) -> None:
    """Swap by swap, slice by slice, entry by entry."""
    found = slots(known) if isinstance(known, str) else known
    table = {(slot.kind, slot.layer, slot.index): slot for slot in found}
    for list_, swaps in key.lists.items():
        kind, consumers = HALVES[list_]
        for (la, ia), (lb, ib) in swaps:
            one, other = table[kind, la, ia].part(consumers), table[kind, lb, ib].part(consumers)
            for (n, at), (m, to) in zip(one, other, strict=True):
                if n not in tensors or m not in tensors:
                    continue  # buffers, among gradients
                a, b = _grid(tensors[n], at), _grid(tensors[m], to)
                kept = tensors[n][a].clone()
                tensors[n][a] = tensors[m][b].clone()
                tensors[m][b] = kept


def _grid(tensor: Tensor, index: Mapping[int, Sequence[int]]) -> tuple[Tensor, ...]:
    lists = [torch.tensor(index[d]) if d in index else torch.arange(n) for d, n in enumerate(tensor.shape)]
    return tuple(torch.meshgrid(*lists, indexing="ij"))


@st.composite
def keys(
    draw: st.DrawFn, name: str, lists: Sequence[str] = tuple(HALVES), across: bool | None = None, most: int = 8
) -> gs.PermutationKey:
    """A key of some lists; ``across`` layers, within them, or (None) either."""
    chosen: dict[str, list[Any]] = {}
    taken: set[tuple[str, int, int]] = set()
    have = {slot.kind for slot in slots(name)}
    usable = [list_ for list_ in lists if HALVES[list_][0] in have and pairs(name, list_, across)]
    for list_ in draw(st.lists(st.sampled_from(usable), min_size=1, max_size=3, unique=True)):
        for a, b in draw(st.lists(st.sampled_from(pairs(name, list_, across)), min_size=1, max_size=most)):
            ends = {inside for slot in (a, b) for inside in _parts(name, slot)}
            if not ends & taken:
                taken |= ends
                chosen.setdefault(list_, []).append([a.at, b.at] if draw(st.booleans()) else [b.at, a.at])
    return gs.PermutationKey(**dict[str, Any](chosen))


@functools.cache
def pairs(name: str, list_: str, across: bool | None) -> list[tuple[Slot, Slot]]:
    """Pairs of slots that a list may swap: all of heads and experts, of neurons those of some."""
    kind, consumers = HALVES[list_]
    found = [slot for slot in slots(name) if slot.kind == kind and (kind != "neuron" or slot.index % 7 in (0, 3))]
    out = []
    for k, a in enumerate(found):
        for b in found[k + 1 :]:
            alike = _shapes(a, consumers) == _shapes(b, consumers) and bool(a.part(consumers))
            inside = a.layer == b.layer and (across is None or a.class_ == b.class_)
            if alike and (across is None or (a.layer != b.layer if across else inside)):
                out.append((a, b))
    return out


def _shapes(slot: Slot, consumers: bool | None) -> list[Any]:
    both = zip(slot.shape, slot.consumer, strict=True)
    return [shape for shape, consumes in both if consumers is None or consumes == consumers]


def _parts(name: str, slot: Slot) -> set[tuple[str, int, int]]:
    """The slot, and those that share entries with it: an expert and the neurons inside."""
    out = {(slot.kind, slot.layer, slot.index)}
    if slot.kind in ("neuron", "expert"):
        out |= {
            (o.kind, o.layer, o.index)
            for o in slots(name)
            if o.kind in ("neuron", "expert") and o.kind != slot.kind and o.layer == slot.layer and _meet(slot, o)
        }
    return out


def _meet(a: Slot, b: Slot) -> bool:
    for n, at in a.slices:
        for m, to in b.slices:
            if n == m and all(set(at[d]) & set(to[d]) for d in at.keys() & to.keys()):
                return True
    return False


def raw(tensor: Tensor) -> Tensor:
    """Bits: what equality of floats does not see."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(sizes[tensor.dtype.itemsize])


def bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: raw(tensor).clone() for name, tensor in tensors.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def source(name: str, key: gs.PermutationKey, model: nn.Module) -> tuple[dict[str, slice], Tensor]:
    """The key as one permutation of all parameters in a row: entry ``p`` receives what entry ``source[p]`` holds."""
    ids, at, start = {}, {}, 0
    for n, p in model.named_parameters():
        at[n] = slice(start, start + p.numel())
        ids[n] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    slow_(ids, name, key)
    return at, torch.cat([ids[n].flatten() for n in at])


def copy_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model of the zoo of one's own."""
    return case(name).copy().to(dtype)


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that a key could leave on a model: attributes, hooks, identities, names, classes."""
    out: dict[str, Any] = {"names": list(tensors_of(model)), "ids": [id(p) for p in model.parameters()]}
    for path, module in model.named_modules():
        hooks = {k: [id(h) for h in v.values()] for k, v in vars(module).items() if k.endswith("_hooks")}
        out[path] = type(module), sorted(vars(module)), hooks
    return out
