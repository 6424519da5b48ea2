"""What methods cost where they cannot be measured here: bytes and FLOPs a step and card, from the shapes of a model.

Each function's docstring is the formula, and stands above its table in ``docs/scaling.md``. Models are on ``meta``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import gradsurgery as gs
from benchmarks.keys import key_of
from benchmarks.models import empty
from gradsurgery.estimators.targets import targets_of
from gradsurgery.evaluation.flops import model_flops
from gradsurgery.keys.plan import KeyPlan
from gradsurgery.tensors import Lines

Figures = dict[str, float]
RANK, BASIS_BYTES, HELD = 16, 2, 0.1
"""Of each part of an adapter; of an entry of a basis in bf16; share of the rotated coordinates that is held."""
GIB, TERA = 2**30, 1e12


@dataclass(frozen=True)
class Cluster:
    """Cards under FSDP2 (every parameter dealt out along its first dimension), and what they hold.

    Attributes:
        cards: Their number, ``n``.
        tokens: Of a card and step, ``T``.
        context: Of a row.
        weight, moments: Bytes an entry of weights, and of AdamW's two moments.
        gathered, reduced: Bytes an entry of gathered weights, and of gradients.
    """

    cards: int
    tokens: int = 8192
    context: int = 8192
    weight: int = 4
    moments: int = 8
    gathered: int = 2
    reduced: int = 4

    @property
    def others(self) -> float:
        """The share of what is dealt out that lies on other cards, ``1 - 1/n``."""
        return 1 - 1 / self.cards


@dataclass(frozen=True, eq=False)
class Facts:
    """What the formulas need of a model.

    Attributes:
        parameters, tensors: Entries ``P``, and parameters.
        model: On ``meta``.
        linears, mlps: ``(outputs, inputs)`` of the weights of all linear layers but the output head; of those of MLPs,
            in the order of the model, with the number of the basis that each reads.
        plan: What a key of 20% swaps.
        swaps: Their number.
    """

    name: str
    parameters: int
    tensors: int
    model: Any
    linears: tuple[tuple[int, int], ...]
    mlps: tuple[tuple[int, int, str], ...]
    plan: KeyPlan
    swaps: int

    @classmethod
    def of(cls, name: str, model: Any, key: gs.PermutationKey | None = None) -> Facts:
        """Facts of a model on ``meta``; the key is drawn if none is given."""
        anatomy = gs.dissect(model)
        key = key or key_of(anatomy, of="swappable")
        shapes = [p.shape for p in model.parameters()]
        linears = [tuple(model.get_parameter(t.name).shape) for t in targets_of(model, "all-linear", "scaling")]
        mlps = [
            (*model.get_parameter(t.name).shape, t.name.replace("up_proj", "gate_proj"))
            for t in targets_of(model, "mlp", "scaling")
        ]
        return cls(
            name,
            sum(s.numel() for s in shapes),
            len(shapes),
            model,
            tuple(linears),
            tuple(mlps),
            key.plan(anatomy),
            len(key),
        )  # type: ignore[arg-type]

    @property
    def keyed(self) -> int:
        """Entries that the key moves, ``K``: both ends of every swap."""
        return self.plan.region.numel()

    def forward(self, cluster: Cluster) -> float:
        """FLOPs of one forward of a card's tokens, ``F``: a third of `gradsurgery.evaluation.model_flops`."""
        return model_flops(self.model, cluster.tokens, cluster.context) / 3


def crossing(plan: KeyPlan, shapes: Mapping[str, tuple[int, ...]], cards: int) -> int:
    """Entries of all swaps whose two ends lie on different cards, both ends counted.

    Parameters are dealt out along their first dimension in blocks of ``ceil(size / cards)``: rows of q, k, v, up and
    gate have owners, columns of o and down lie on all cards and change places there.
    """
    total = 0
    for swap in plan.weights.swaps:
        owners = [_owners(end, shapes[end.name], cards) for end in (swap.a, swap.b)]
        if owners[0] is not None and owners[1] is not None:
            total += 2 * int((owners[0] != owners[1]).sum()) * _size(swap.a, shapes[swap.a.name])
    return total


def _owners(lines: Lines, shape: tuple[int, ...], cards: int) -> np.ndarray | None:
    block = -(-shape[0] // cards)
    if lines.dim == 0:
        return lines.index // block
    start = next((start for dim, start, _ in lines.spans if dim == 0), None)
    return None if start is None else np.full(lines.index.size, start // block)


def _size(lines: Lines, shape: tuple[int, ...]) -> int:
    lengths = {dim: length for dim, _, length in lines.spans}
    return int(np.prod([lengths.get(d, n) for d, n in enumerate(shape) if d != lines.dim], dtype=np.int64))


def stock(facts: Facts, cluster: Cluster) -> Figures:
    """The stock step. FLOPs: `3 F` with `F = T (2 N + 4 L H context)`, `N` the parameters that multiply each token, `L`
    layers, `H` the width of all heads. Between cards: weights gathered twice in bf16, gradients reduced once in fp32,
    `P (2 · 2 + 4) (1 − 1/n)` bytes. Held: weights, gradients, two moments in fp32, `16 P / n` bytes.
    """
    traffic = facts.parameters * (2 * cluster.gathered + cluster.reduced) * cluster.others
    held = facts.parameters * (cluster.weight + cluster.reduced + cluster.moments) / cluster.cards
    return {
        "TFLOP": 3 * facts.forward(cluster) / TERA,
        "between cards, GiB": traffic / GIB,
        "held, GiB": held / GIB,
    }


def key(facts: Facts, cluster: Cluster) -> Figures:
    """A key applied once to fp32 weights: 20% of heads and neurons, drawn for this model. Both ends of every swap, `K`
    entries, are read once and written once: `2 · 4 K / n` bytes a card. Rows go to the card that owns their new place:
    `4 X / n` bytes, `X` the entries of rows whose two ends lie on different cards (counted swap by swap; about `1 −
    1/n` of all rows); columns are on every card and stay there.
    """
    rows = crossing(facts.plan, _shapes(facts), cluster.cards)
    return {
        "swaps": facts.swaps,
        "entries, M": facts.keyed / 1e6,
        "read and written, GiB": 2 * facts.keyed * cluster.weight / cluster.cards / GIB,
        "between cards, GiB": rows * cluster.weight / cluster.cards / GIB,
    }


def tiered(facts: Facts, cluster: Cluster) -> Figures:
    """What `methods.tiered` adds to the stock step: a second forward and backward (`3 F`, two gathers, one reduction),
    and the key four times: weights and the gradients of the first pass, there and back. Nothing is held in addition.
    """
    once = key(facts, cluster)
    more = stock(facts, cluster)
    return {
        "TFLOP": more["TFLOP"],
        "passes between cards, GiB": more["between cards, GiB"],
        "key between cards, GiB": 4 * once["between cards, GiB"],
        "key read and written, GiB": 4 * once["read and written, GiB"],
        "held, GiB": 0.0,
    }


def private(facts: Facts, cluster: Cluster) -> Figures:
    """What `methods.private_finetune` adds, with a stock step's tokens in each of `private` and `public`: a second
    forward and backward, the reference's forward (`4 F`, three gathers, one reduction), the key as in `tiered`. The
    reference is a snapshot of the keyed entries, `4 K / n` bytes, that changes places with them before its forward and
    after it: `2 · 4 · 4 K / n` bytes read and written. During the optimizer's step `freeze` keeps the public entries of
    tensors that hold keyed ones.
    """
    once = key(facts, cluster)
    traffic = facts.parameters * (3 * cluster.gathered + cluster.reduced) * cluster.others
    shapes = _shapes(facts)
    partly = sum(int(np.prod(shapes[name])) for name in facts.plan.region.entries) - facts.keyed
    each = facts.keyed * cluster.weight / cluster.cards / GIB
    return {
        "TFLOP": 4 * facts.forward(cluster) / TERA,
        "passes between cards, GiB": traffic / GIB,
        "key between cards, GiB": 4 * once["between cards, GiB"],
        "key, snapshot read and written, GiB": 4 * once["read and written, GiB"] + 8 * each,
        "snapshot, GiB": each,
        "freeze, in the step, GiB": partly * cluster.weight / cluster.cards / GIB,
    }


def opposed(facts: Facts, cluster: Cluster) -> Figures:
    """What `methods.opposed` adds with a snapshot of the whole model: the reference's forward and a second backward
    over the same forward (`3 F`, two gathers, one reduction), a slot of `4 P / n` bytes, the snapshot, `4 P / n` (a
    cache of log-probabilities needs neither it nor the forward). Read and written: the snapshot twice both ways, `8 ·
    4 P / n`; sums read both gradients, the subtraction reads both and writes one, `5 · 4 P / n`. Numbers reduced: a
    Gram matrix of the two gradients for every parameter, 4 fp64 numbers each (again where rounding left something).
    """
    traffic = facts.parameters * (2 * cluster.gathered + cluster.reduced) * cluster.others
    whole = facts.parameters * cluster.weight / cluster.cards / GIB
    slot = facts.parameters * cluster.reduced / cluster.cards / GIB
    return {
        "TFLOP": 3 * facts.forward(cluster) / TERA,
        "passes between cards, GiB": traffic / GIB,
        "slot, GiB": slot,
        "snapshot, GiB": whole,
        "read and written, GiB": 8 * whole + 5 * slot,
        "numbers reduced": 4 * facts.tensors,
    }


def rotation(facts: Facts, cluster: Cluster) -> Figures:
    """What `methods.warp` adds on the MLPs' weights, whole bases in bf16, 10% of the coordinates held: two products
    with every weight's basis, `4 · out · in² / n` FLOPs a weight, however many tokens a step has. Every card holds
    every basis, `2 in²` bytes (one for up and gate); held coordinates in fp32, `0.1 · 4 out · in / n`, and a bit an
    entry. Bases of `k` columns (`basis.top(k)`) cost `k / in` of the products and of the bases.
    """
    products = sum(4.0 * out * width * width for out, width, _ in facts.mlps)
    bases = {basis: width * width for _, width, basis in facts.mlps}
    entries = sum(out * width for out, width, _ in facts.mlps)
    return {
        "TFLOP": products / cluster.cards / TERA,
        "bases, GiB": sum(bases.values()) * BASIS_BYTES / GIB,
        "coordinates and masks, GiB": entries * (HELD * 4 + 1 / 8) / cluster.cards / GIB,
    }


def quarantine(facts: Facts, cluster: Cluster) -> Figures:
    """A low-rank adapter with a quarantine, rank 16 each, on all linear layers, in place of training the model.
    Trained: `A = 2 · 16 Σ (in + out)`, as many stay at their start; weights, gradients and moments in fp32, `16 A + 4
    A` bytes in all. FLOPs: the model's without those of its weight gradients, `T (4 N + 12 L H context)`, and of the
    adapter `10 T A`: four products a part forward, as many for activations backward, two for its own weights.
    Gradients of the adapter alone are reduced.
    """
    trained = 2 * RANK * sum(out + width for out, width in facts.linears)
    whole = 3 * facts.forward(cluster)
    attention = whole - model_flops(facts.model, cluster.tokens, 0)
    base = (whole - attention) * 2 / 3 + attention
    return {
        "trained, M": trained / 1e6,
        "model TFLOP": base / TERA,
        "adapter TFLOP": 10.0 * cluster.tokens * trained / TERA,
        "adapter in all, GiB": trained * (2 * cluster.weight + cluster.reduced + cluster.moments) / GIB,
        "gradients of the stock step": trained / facts.parameters,
    }


def checkpoint(facts: Facts, cluster: Cluster) -> Figures:
    """`gs.save_checkpoint`: weights and two moments in fp32, `12 P` bytes; every card writes its own `12 P / n`. Kept
    slots and running means are `4 P` each; keys, bases and masks are in files of their own.
    """
    whole = facts.parameters * (cluster.weight + cluster.moments) / GIB
    return {"all, GiB": whole, "a card, GiB": whole / cluster.cards}


def _shapes(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    return facts.plan.anatomy.space.shapes


SECTIONS = {
    "Stock step": stock,
    "One key": key,
    "Tiered": tiered,
    "Private finetuning": private,
    "Opposed": opposed,
    "Rotation": rotation,
    "Quarantine": quarantine,
    "Checkpoints": checkpoint,
}
MODELS, CARDS = ("8b", "70b"), (8, 64)


def compute(models: tuple[str, ...] = MODELS, cards: tuple[int, ...] = CARDS) -> dict[str, list[dict[str, Any]]]:
    """By section, a line for every model and number of cards; a card's figures a step."""
    found = [Facts.of(name, empty(name)) for name in models]
    return {
        title: [{"model": f.name, "cards": n, **make(f, Cluster(n))} for f in found for n in cards]
        for title, make in SECTIONS.items()
    }
