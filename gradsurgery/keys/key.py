"""Permutation keys: pair swaps of heads and neurons across layers that turn one set of weights into two tiers.

Tiered alignment: El Feghali et al. 2026, "Toward Open Weight Models Without Risks", arXiv 2606.21638.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy import Anatomy, Region
from gradsurgery.anatomy.dissect import dissect
from gradsurgery.anatomy.space import ParameterSpace, require_same_space, require_unpacked, unwrap
from gradsurgery.errors import ArtefactError, PlanError, SelectionError
from gradsurgery.keys import apply, draw, entropy, store
from gradsurgery.keys.lists import LISTS, Swap, as_swaps, canonical, check_swaps, slots_of
from gradsurgery.keys.plan import KeyPlan
from gradsurgery.keys.windows import warn_of
from gradsurgery.transforms.base import Traits
from gradsurgery.transforms.stages import WeightTransform


@dataclass(frozen=True, eq=False, repr=False)
class PermutationKey(WeightTransform):
    """Pair swaps of units between layers of equal shape: the secret that turns tier C1 into tier C2, and back.

    Applying a key exchanges, for every swap, all slices of one unit with those of the other: rows of q, k, v, up and
    gate with their biases, columns of o and down. Swaps are disjoint, so a key is its own inverse.

    Args:
        attn_heads: Swaps ``[[layer, i], [layer, j]]`` of heads; of KV groups with their query heads where heads share
            keys and values.
        mlp_cols: Swaps of MLP neurons. The index counts through all neurons of a layer, expert by expert.
        experts: Swaps of experts with their router rows.
        attn_out_heads: Heads of which only the columns of the output projection move.
        mlp_up_cols: Neurons of which only what makes the activation moves (up, gate and their biases).
        mlp_down_cols: Neurons of which only what reads the activation moves.
        model: Fingerprint of the model the key was made for, if known.

    Raises:
        SelectionError: by `validate`, `region`, `apply_`: a slot twice, out of range, no whole numbers, other shapes.
        ArtefactError: by the same: a key made for another model.

    Example:
        >>> key = gs.PermutationKey(attn_heads=[[[0, 0], [1, 1]]], mlp_cols=[[[0, 3], [1, 5]], [[0, 9], [1, 2]]])
        >>> key.validate(anatomy)
        >>> key
        PermutationKey(attn_heads: 1 swap, mlp_cols: 2 swaps, fingerprint a2884afb9ad852a8)
        >>> with key.applied(model):                       # C2 inside the block
        ...     logits = model(**batch).logits
    """

    attn_heads: Any = ()
    mlp_cols: Any = ()
    experts: Any = ()
    attn_out_heads: Any = ()
    mlp_up_cols: Any = ()
    mlp_down_cols: Any = ()
    model: str | None = None
    _plans: dict[str, KeyPlan] = field(default_factory=dict, init=False)

    traits = Traits(linear=True, self_inverse=True)

    def __post_init__(self) -> None:
        for name in LISTS:
            object.__setattr__(self, name, as_swaps(getattr(self, name)))

    # what it is

    @cached_property
    def lists(self) -> dict[str, tuple[Swap, ...]]:
        """The lists that hold swaps, by name.

        Raises:
            SelectionError: something that is no list of swaps ``[[layer, i], [layer, j]]`` of whole numbers.
        """
        given = {name: getattr(self, name) for name in LISTS}
        for name, swaps in given.items():
            check_swaps(name, swaps)
        return {name: swaps for name, swaps in given.items() if swaps}

    def __len__(self) -> int:
        return sum(map(len, self.lists.values()))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the swaps, whatever their order: names the key without giving it away."""
        text = json.dumps({name: canonical(swaps) for name, swaps in self.lists.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def slots(self) -> frozenset[Any]:
        """Everything that the key moves, as ``(kind, (layer, index), side)``."""
        return frozenset(slots_of(self.lists))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PermutationKey):
            return NotImplemented
        return {n: canonical(s) for n, s in self.lists.items()} == {n: canonical(s) for n, s in other.lists.items()}

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        """Without the swaps: a key is a secret, and logs are not."""
        try:
            _ = self.lists
        except SelectionError:
            return "PermutationKey(malformed; key.fingerprint says where)"
        counts = [f"{name}: {len(swaps)} swap{'s' * (len(swaps) != 1)}" for name, swaps in self.lists.items()]
        return f"PermutationKey({', '.join([*counts, f'fingerprint {self.fingerprint}'])})"

    __str__ = __repr__

    def describe(self) -> str:
        return f"key({self.fingerprint})"

    def regions(self) -> Iterable[Region]:
        """The keyed region of the model that the key was last planned for, if any."""
        return [plan.region for plan in self._plans.values()][-1:]

    # where it lies in a model

    def plan(self, anatomy: Anatomy) -> KeyPlan:
        """What the key means in a model; made once."""
        if not self.lists:
            raise SelectionError("the key holds no swap, so applying it would do nothing.")
        fingerprint = anatomy.space.fingerprint
        if self.model is not None and self.model != fingerprint:
            raise ArtefactError(
                f"this key ({self.fingerprint}) was made for a model with fingerprint {self.model}, and this "
                f"{anatomy.space.model} is {fingerprint}. If only names differ, key.for_any_model() drops the mark."
            )
        if fingerprint not in self._plans:
            self._plans[fingerprint] = KeyPlan(self.lists, anatomy)
        return self._plans[fingerprint]

    def plan_for(self, model: nn.Module, anatomy: Anatomy | None = None) -> KeyPlan:
        """The plan for a model, dissected where no anatomy of it is known yet."""
        base = unwrap(model)
        known = _KNOWN.setdefault(base, {})
        mine, plan = known.get(id(self), (None, None))
        if plan is None or mine is None or mine() is not self or not plan.fits(base):
            space = ParameterSpace.of(base)
            if anatomy is None and space.fingerprint in self._plans:
                plan = self._plans[space.fingerprint]
            elif anatomy is None:
                plan = self.plan(dissect(base))
            else:
                require_same_space(anatomy.space, space, "the anatomy given to the key")
                plan = self.plan(anatomy)
            require_unpacked(space, plan.weights.names, "a permutation key")
            warn_of(plan, base, self.lists)
            number = id(self)
            known[number] = weakref.ref(self, lambda _: known.pop(number, None)), plan
        mark = plan.anatomy.space.fingerprint
        self._plans[mark] = self._plans.pop(mark, plan)  # `regions` tells of the last model
        return plan

    def validate(self, anatomy: Anatomy) -> None:
        """Check the key against a model: types, bounds, no slot twice, equal shapes, the same fingerprint.

        Raises:
            SelectionError: what is wrong, with the list and position of the swap.
            ArtefactError: a key made for another model.
        """
        self.plan(anatomy)

    def region(self, anatomy: Anatomy) -> Region:
        """The keyed entries: both ends of every swap; the same set in C1 and in C2. Everything else is public."""
        self.validate(anatomy)
        return self.plan(anatomy).region

    def entropy_bits(self, anatomy: Anatomy, functional: bool = False) -> float:
        """Bits of secrecy: log2 of the number of keys with as many swaps between each pair of layers; see `entropy`.

        Args:
            anatomy: The model's anatomy.
            functional: Count the keys whose C2 computes something else: interchangeable units of one layer may take
                each other's places.
        """
        self.validate(anatomy)
        return entropy.bits(self.lists, anatomy, functional)

    # applying

    def apply_(
        self,
        model: nn.Module,
        gradients: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
        anatomy: Anatomy | None = None,
    ) -> None:
        """Swap in place, C1 -> C2: exact in every dtype, on plain and sharded weights, seen by compiled models.

        Args:
            model: The model, possibly in DDP, ``fully_shard`` or ``torch.compile``.
            gradients: ``.grad`` follows the weights.
            optimizer: Its moments follow as well.
            anatomy: Spares dissecting the model at the first call.

        Raises:
            KeyStateError: the key is applied already, or another one that shares slots with it.
            PlanError: weights that cannot be swapped (other dtypes, quantised, factored moments); nothing has moved.
        """
        apply.apply_(self, unwrap(model), self.plan_for(model, anatomy), gradients, optimizer)

    def unapply_(
        self,
        model: nn.Module,
        gradients: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
        anatomy: Anatomy | None = None,
    ) -> None:
        """Swap back in place, C2 -> C1.

        Raises:
            KeyStateError: the key is not applied.
        """
        apply.unapply_(self, unwrap(model), self.plan_for(model, anatomy), gradients, optimizer)

    @contextmanager
    def applied(
        self,
        model: nn.Module,
        gradients: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
        anatomy: Anatomy | None = None,
    ) -> Iterator[nn.Module]:
        """C2 inside the block, C1 after it, also on an exception."""
        self.apply_(model, gradients, optimizer, anatomy)
        try:
            yield model
        finally:
            self.unapply_(model, gradients, optimizer)

    def check(self, model: nn.Module) -> None:
        """Raise where a pass under this key means nothing on a model: what trains in one tier must train in the other.

        Raises:
            PlanError: a swap between weights that train and weights that do not.
        """
        base = unwrap(model)
        for swap in self.plan_for(base).weights.swaps:
            trains, stands = swap.a.name, swap.b.name
            if base.get_parameter(trains).requires_grad != base.get_parameter(stands).requires_grad:
                trains, stands = sorted((trains, stands), key=lambda n: not base.get_parameter(n).requires_grad)
                raise PlanError(
                    f"the key swaps units of {trains}, which trains, with units of {stands}, which does not: they "
                    f"would train in one tier and stand still in the other. Let both train; gs.freeze(region) keeps "
                    f"entries where they are in every tier."
                )

    @contextmanager
    def during(self, model: nn.Module, slots: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
        """Around a pass: weights, gradients and open slots are in C2 inside the block."""
        plan = self.plan_for(model)
        apply.apply_(self, model, plan, True, None, slots)
        try:
            yield
        finally:
            apply.unapply_(self, model, plan, True, None, slots)

    # other keys

    @classmethod
    def compose(cls, *keys: PermutationKey) -> PermutationKey:
        """One key that does what several disjoint keys do one after the other.

        Raises:
            SelectionError: two of them share a slot: the result would not be its own inverse.
        """
        taken: dict[Any, PermutationKey] = {}
        for key in keys:
            for slot in key.slots:
                if slot in taken:
                    raise SelectionError(
                        f"keys {taken[slot].fingerprint} and {key.fingerprint} both move {slot[0]} {slot[1][1]} of "
                        f"layer {slot[1][0]}; compose takes disjoint keys (generate(count=n) draws such)."
                    )
                taken[slot] = key
        lists: dict[str, Any] = {n: [swap for key in keys for swap in key.lists.get(n, ())] for n in LISTS}
        models = {key.model for key in keys if key.model is not None}
        if len(models) > 1:
            raise ArtefactError(f"these keys were made for different models: {', '.join(sorted(models))}.")
        return cls(**lists, model=models.pop() if models else None)

    def subset(self, fraction: float, seed: int | None = None) -> PermutationKey:
        """A key of some of the swaps, drawn from each list: what somebody knows who knows a part of the key.

        Args:
            fraction: Share of the swaps, 0 to 1; rounded to whole swaps over all lists.
            seed: Of the draw; without one, from the operating system.
        """
        return draw.subset(self, fraction, seed)

    def for_any_model(self) -> PermutationKey:
        """The same swaps without the mark of the model that they were made for."""
        return dataclasses.replace(self, model=None)

    @classmethod
    def generate(cls, anatomy: Anatomy | draw.Dimensions, *args: Any, **options: Any) -> Any:
        """Draw a key, or (``count`` > 1) a list of disjoint ones; see `gradsurgery.keys.draw.generate`.

        Args:
            anatomy: The model's anatomy, or ``gs.keys.Dimensions``.
            fraction: Share of the entries that the key moves, both ends counted.
            attention_ratio: Share of that which lies in attention.
            of: What ``fraction`` is a share of: ``"swappable"`` entries (units of swappable kinds), or ``"all"``.
            pairing: ``"cross_layer"``: both ends in different layers; ``"any"``.
            count: How many disjoint keys.
            seed: Makes the draw repeatable, and guessable; without it the operating system's entropy is used.
            passphrase: Derive the key from a secret text (scrypt) instead.

        Example:
            >>> key = gs.PermutationKey.generate(anatomy, fraction=0.2, seed=0)
            >>> 0.1 < key.region(anatomy).numel() / (anatomy.heads | anatomy.neurons).numel() <= 0.2
            True
        """
        return draw.generate(anatomy, *args, **options)

    # files

    def save(self, path: str | Path) -> None:
        """Write the key as JSON, whole or not at all, readable by its owner only."""
        store.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> PermutationKey:
        """Read a key file, ours or the originals'; warns where others may read it too.

        Raises:
            ArtefactError: missing, truncated, or no key.
        """
        return cls(**store.load(Path(path)))


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[weakref.ref[PermutationKey], KeyPlan]]] = (
    weakref.WeakKeyDictionary()
)
