"""Draw keys: how many swaps fit a budget of entries, and which slots they join."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from gradsurgery.anatomy import Anatomy
from gradsurgery.errors import SelectionError
from gradsurgery.keys.lists import Side, Slot, Swap
from gradsurgery.keys.passphrase import source_of
from gradsurgery.keys.slots import SlotTable

log = logging.getLogger("gradsurgery")

Pools = dict[Any, dict[int, list[Slot]]]
"""Free slots by the shape of their units and by layer."""


@dataclass(frozen=True)
class Dimensions:
    """A model's dimensions, to draw a key for it without having it.

    Args:
        num_layers: Transformer layers, all alike.
        num_heads: Attention heads a layer.
        hidden_size: Width of the residual stream.
        mlp_dim: Neurons a layer.
        num_kv_heads: Key and value heads, where heads share them: the key then swaps KV groups.
        head_dim: Width of a head; ``hidden_size / num_heads`` if not given.
        gated: The MLP has a gate projection.
        mlp_bias: Neurons have a bias (each of up and gate).
        attention_bias: Heads have biases of q, k and v.
        total: All entries of the model, for ``of="all"``.
    """

    num_layers: int
    num_heads: int
    hidden_size: int
    mlp_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    gated: bool = False
    mlp_bias: bool = True
    attention_bias: bool = False
    total: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "hidden_size", "mlp_dim"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise SelectionError(f"Dimensions: {name} is a positive whole number, not {getattr(self, name)!r}.")
        if self.num_heads % self.groups:
            raise SelectionError(f"Dimensions: {self.num_heads} heads do not share {self.groups} key and value heads.")

    @property
    def groups(self) -> int:
        return self.num_kv_heads or self.num_heads

    def pool(self, kind: str, side: Side) -> tuple[Pools, dict[Any, int]]:
        """Slots of a kind, all of one shape, and the entries of one."""
        if kind == "expert":
            raise SelectionError("Dimensions knows no experts; draw from an anatomy, gs.dissect(model).")
        count = self.groups if kind == "head" else self.mlp_dim
        layers = {layer: [(layer, i) for i in range(count)] for layer in range(self.num_layers)}
        return {kind: layers}, {kind: self._size(kind, side)}

    def _size(self, kind: str, side: Side) -> int:
        if kind == "head":
            width = self.head_dim or self.hidden_size // self.num_heads
            queries = self.num_heads // self.groups
            rows = width * (queries + 2)
            makes, reads = rows * (self.hidden_size + self.attention_bias), width * queries * self.hidden_size
        else:
            makes, reads = (1 + self.gated) * (self.hidden_size + self.mlp_bias), self.hidden_size
        return {"whole": makes + reads, "producers": makes, "consumers": reads}[side]

    def entries(self, of: str) -> int:
        if of == "all":
            if self.total is None:
                raise SelectionError('of="all" needs Dimensions(total=…), the number of all entries of the model.')
            return self.total
        heads, neurons = self._size("head", "whole") * self.groups, self._size("neuron", "whole") * self.mlp_dim
        return self.num_layers * (heads + neurons)


def generate(
    anatomy: Anatomy | Dimensions,
    fraction: float = 0.2,
    attention_ratio: float = 0.25,
    of: Literal["swappable", "all"] = "swappable",
    pairing: Literal["cross_layer", "any"] = "cross_layer",
    count: int = 1,
    seed: int | None = None,
    passphrase: str | None = None,
    attention: Literal["full", "output"] = "full",
    mlp: Literal["full", "up", "down"] = "full",
    expert_ratio: float = 0.0,
) -> Any:
    """Draw a key of a given size, or several disjoint ones.

    Swaps are drawn one by one, uniformly among the slots that are left, until the next would exceed the budget; what
    the last head leaves of its share goes to the neurons, and all of it to heads where a model has no neurons.

    Args:
        anatomy: The model's anatomy, or its `Dimensions`.
        fraction: Share of the entries that the key moves, both ends counted.
        attention_ratio: Share of the budget that goes to heads; ``expert_ratio`` to whole experts; the rest to neurons.
        of: ``"swappable"``: the entries of heads and neurons (and experts); ``"all"``: those of the model.
        pairing: ``"cross_layer"`` joins different layers alone; swaps inside a layer change nothing where its units are
            interchangeable, so ``"any"`` spends entries on nothing.
        count: Number of keys, disjoint from each other, each of this size; a list if more than one.
        seed, passphrase: Where randomness comes from; by default the operating system.
        attention: ``"output"`` moves the columns of the output projection alone.
        mlp: ``"up"`` or ``"down"`` moves one side of the neurons alone.

    Raises:
        SelectionError: options out of range, or more swaps than the model has slots for.
    """
    _check(fraction, attention_ratio, of, pairing, count, attention, mlp, expert_ratio)
    marks = anatomy.fingerprint if isinstance(anatomy, Anatomy) else None
    draws = source_of(seed, passphrase, marks or "")
    total = anatomy.entries(of) if isinstance(anatomy, Dimensions) else _entries(anatomy, of)
    wanted: list[tuple[str, str, Side, float]] = [
        ("experts", "expert", "whole", expert_ratio),
        ("attn_heads", "head", "whole", attention_ratio)
        if attention == "full"
        else ("attn_out_heads", "head", "consumers", attention_ratio),
        {
            "full": ("mlp_cols", "neuron", "whole", 1 - attention_ratio - expert_ratio),
            "up": ("mlp_up_cols", "neuron", "producers", 1 - attention_ratio - expert_ratio),
            "down": ("mlp_down_cols", "neuron", "consumers", 1 - attention_ratio - expert_ratio),
        }[mlp],  # type: ignore[list-item]
    ]
    keys: list[dict[str, list[Swap]]] = [{} for _ in range(count)]
    spent = [0] * count
    blocked: set[Slot] = set()
    drawn = []
    for name, kind, side, share in wanted:
        if share > 0:
            found = anatomy.pool(kind, side) if isinstance(anatomy, Dimensions) else _pool(anatomy, kind, side)
            drawn.append((name, kind, share, *found))
    if expert_ratio and not drawn[0][-1]:
        raise SelectionError(f"expert_ratio is {expert_ratio}, and this model has no experts.")
    drawn = [one for one in drawn if one[-1]]  # kinds that the model has
    for name, kind, share, pools, sizes in drawn:
        if kind == "neuron" and blocked:
            for layers in pools.values():
                for slots in layers.values():
                    slots[:] = [slot for slot in slots if slot not in blocked]
        for k, key in enumerate(keys):
            last = name == drawn[-1][0]
            budget = fraction * total - spent[k] if last else fraction * total * share
            key[name], used = fill(pools, sizes, budget, pairing, draws, name)
            spent[k] += used
            if not key[name]:
                log.warning("%s: its share, %.0f entries, is less than one swap; none is drawn.", name, budget)
        if kind == "expert":
            assert isinstance(anatomy, Anatomy)
            blocked = set(neurons_inside(anatomy, [slot for key in keys for swap in key[name] for slot in swap]))
    if not any(swaps for key in keys for swaps in key.values()):
        raise SelectionError(f"fraction={fraction} of {total:,} entries is less than one swap; raise it.")
    from gradsurgery.keys.key import PermutationKey

    out = [PermutationKey(**dict[str, Any](key), model=marks) for key in keys]
    return out if count > 1 else out[0]


def _check(
    fraction: float, attention: float, of: str, pairing: str, count: int, side: str, mlp: str, experts: float
) -> None:
    for name, value in (("fraction", fraction), ("attention_ratio", attention), ("expert_ratio", experts)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise SelectionError(f"{name} is a number from 0 to 1, not {value!r}.")
    if attention + experts > 1:
        raise SelectionError(f"attention_ratio {attention} and expert_ratio {experts} are more than the whole.")
    for name, text, options in (
        ("of", of, ("swappable", "all")),
        ("pairing", pairing, ("cross_layer", "any")),
        ("attention", side, ("full", "output")),
        ("mlp", mlp, ("full", "up", "down")),
    ):
        if text not in options:
            raise SelectionError(f"{name} is one of {', '.join(options)}, not {text!r}.")
    if type(count) is not int or count < 1:
        raise SelectionError(f"count is a positive whole number, not {count!r}.")


def _entries(anatomy: Anatomy, of: str) -> int:
    if of == "all":
        return anatomy.space.numel()
    return (anatomy.kv_groups | anatomy.neurons).numel()


def _pool(anatomy: Anatomy, kind: str, side: Side) -> tuple[Pools, dict[Any, int]]:
    """The slots of a kind by the shape of their units, and the entries of one of each."""
    pools: Pools = {}
    sizes: dict[Any, int] = {}
    for layer, places in SlotTable.of(anatomy).layers(kind).items():
        start = 0
        for place in places:
            shape = place.shape(side)
            sizes[shape] = place.size(side)
            slots = pools.setdefault(shape, {}).setdefault(layer, [])
            slots.extend((layer, start + i) for i in range(len(place)))
            start += len(place)
    return pools, {shape: size for shape, size in sizes.items() if size}


def fill(
    pools: Pools, sizes: dict[Any, int], budget: float, pairing: str, draws: random.Random, name: str
) -> tuple[list[Swap], int]:
    """Take slots out of the pools, pair by pair, for as long as the budget lasts; with the entries it took.

    Raises:
        SelectionError: the pools are empty before that.
    """
    out: list[Swap] = []
    spent, limit = 0, math.floor(budget)
    while True:
        fits = [shape for shape, size in sizes.items() if spent + 2 * size <= limit]
        if not fits:
            return out, spent
        ready = {shape: _pairs_left(pools[shape], pairing) for shape in fits}
        left = sum(ready.values())
        if not left:
            raise SelectionError(
                f"{name}: the budget of {limit:,} entries needs more swaps than the model has slots for; {len(out)} "
                f"swaps of {spent:,} entries fit. Lower fraction, or change attention_ratio."
            )
        if len(fits) == len(sizes) == 1:  # all alike: draw what the budget allows without counting again
            (shape,) = fits
            todo = min((limit - spent) // (2 * sizes[shape]), left)
            out.extend(_draw(pools[shape], pairing, draws) for _ in range(todo))
            spent += todo * 2 * sizes[shape]
            continue
        shape = _pick(ready, draws)
        out.append(_draw(pools[shape], pairing, draws))
        spent += 2 * sizes[shape]


def _pairs_left(layers: dict[int, list[Slot]], pairing: str) -> int:
    """How many disjoint pairs can still be made."""
    counts = [len(slots) for slots in layers.values()]
    total, largest = sum(counts), max(counts, default=0)
    return min(total // 2, total - largest) if pairing == "cross_layer" else total // 2


def _draw(layers: dict[int, list[Slot]], pairing: str, draws: random.Random) -> Swap:
    """Two free slots; one from the fullest layer where otherwise the last slots would all lie there."""
    left = {layer: len(slots) for layer, slots in layers.items()}
    total, fullest = sum(left.values()), max(left, key=lambda layer: left[layer])
    forced = pairing == "cross_layer" and 2 * left[fullest] >= total
    first = fullest if forced else _pick(left, draws)
    one = _take(layers[first], draws)
    left[first] = 0 if pairing == "cross_layer" else left[first] - 1
    return one, _take(layers[_pick(left, draws)], draws)


def _pick(left: dict[Any, int], draws: random.Random) -> Any:
    """One of the keys, as likely as its number."""
    at = draws.randrange(sum(left.values()))
    for layer, n in left.items():
        if at < n:
            return layer
        at -= n
    raise AssertionError("unreachable")


def _take(slots: list[Slot], draws: random.Random) -> Slot:
    at = draws.randrange(len(slots))
    slots[at], slots[-1] = slots[-1], slots[at]
    return slots.pop()


def neurons_inside(anatomy: Anatomy, experts: Iterable[Slot]) -> Iterable[Slot]:
    """The slots of neurons that lie inside some experts: who moves with its expert is not moved again."""
    from gradsurgery.anatomy import Units
    from gradsurgery.anatomy.entries import all_bits

    table = SlotTable.of(anatomy)
    for slot in experts:
        place, index = table.locate("expert", slot, "experts")
        expert, start = Units(anatomy, {place.position: 1 << index}), 0
        for inner in table.places.get(("neuron", slot[0]), ()):
            if Units(anatomy, {inner.position: all_bits(len(inner))}).any_of(expert):
                yield from ((slot[0], start + i) for i in range(len(inner)))
            start += len(inner)


def subset(key: Any, fraction: float, seed: int | None) -> Any:
    """A key of some swaps of another; see `PermutationKey.subset`."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise SelectionError(f"fraction is a number from 0 to 1, not {fraction!r}.")
    swaps = [(name, swap) for name, found in key.lists.items() for swap in found]
    kept = source_of(seed, None).sample(range(len(swaps)), round(fraction * len(swaps)))
    lists: dict[str, list[Swap]] = {}
    for k in sorted(kept):
        lists.setdefault(swaps[k][0], []).append(swaps[k][1])
    return type(key)(**lists, model=key.model)
