"""Tiered alignment: two or more tiers in one set of weights, told apart by secret permutations.

El Feghali et al. 2026, "Toward Open Weight Models Without Risks", arXiv 2606.21638. C1 is the model as released; C2 is
the same weights under a key. Keyed entries learn from their tier alone, public entries from the mean of all tiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gradsurgery.anatomy import Anatomy, Region
from gradsurgery.errors import PlanError
from gradsurgery.keys import PermutationKey, StepUnder
from gradsurgery.losses import causal_lm
from gradsurgery.surgery import Method, Pass, sample_one
from gradsurgery.surgery import every as every_kth
from gradsurgery.surgery.passes import Loss
from gradsurgery.surgery.schedule import Schedule
from gradsurgery.transforms import Transform, freeze, mask, scale
from gradsurgery.transforms.stages import UpdateTransform

Tiers = Literal["all", "sampled", "round_robin"]


def tiered(
    key: PermutationKey | Sequence[PermutationKey],
    anatomy: Anatomy,
    every: int = 1,
    tiers: Tiers = "all",
    cumulative: bool = False,
    public_weights: Sequence[float] | None = None,
    keyed_weights: Sequence[float] | None = None,
    step_in: Literal["C1", "C2"] = "C1",
    loss: Loss = causal_lm,
    seed: int = 0,
) -> Method:
    r"""A pass in C1, and one in each keyed tier, on the same batch.

    With keyed entries ``K_i`` (both ends of every swap of key ``i``), public entries ``S`` (all others), and ``n``
    passes that run: ``g[S] = 1/n sum_j g_j[S]`` and ``g[K_i] = g_i[K_i]``, the gradient of tier ``i`` alone. After
    ``surgery.backward`` the model is in C1 and the gradients have followed their weights there.

    Args:
        key: The key of tier C2, or disjoint keys of tiers C2, C3, ….
        anatomy: The model's anatomy.
        every: The keyed passes run in every ``every``-th step; in between, keyed entries do not move. The first step
            is a keyed one.
        tiers: With several keys: ``"all"`` of them run in a step, or one, ``"sampled"`` or by ``"round_robin"``.
        cumulative: Tier C3 runs under the keys of C2 and C3, and so on; what a key moves then learns from all tiers
            that include it, their mean.
        public_weights: Factor of each tier's gradient (C1 first) on public entries, in place of the mean.
        keyed_weights: Factor of each keyed tier's gradient on the keyed entries it trains, in place of 1.
        step_in: ``"C2"`` steps the optimizer in C2, as the originals do; equal for elementwise optimizers.
        loss: Loss of all passes.
        seed: Of ``tiers="sampled"``.

    Raises:
        PlanError: options that do not go together.
        SelectionError, ArtefactError: keys that do not fit the model, or share slots.

    Example:
        >>> key = gs.PermutationKey.generate(anatomy, fraction=0.2, seed=0)
        >>> surgery = gs.attach(gs.methods.tiered(key, anatomy), model, torch.optim.AdamW(model.parameters()))
        >>> sorted(surgery.backward(batch))
        ['C1', 'C2']
        >>> surgery.remove()
    """
    keys = [key] if isinstance(key, PermutationKey) else list(key)
    _check(keys, every, tiers, public_weights, keyed_weights, step_in)
    regions = [one.region(anatomy) for one in keys]
    composed = PermutationKey.compose(*keys)  # raises where two keys share a slot
    keyed = composed.region(anatomy)
    public = ~keyed
    names = [f"C{k + 2}" for k in range(len(keys))]

    # the mean of two passes by halving the losses, which is exact: then the few keyed entries alone are edited
    halved = public_weights is None and (len(keys) == 1 or tiers != "all")
    weight: float | str = "1/passes" if halved else 1.0

    def public_share(tier: int) -> list[Transform]:
        factor = "1/passes" if public_weights is None else float(public_weights[tier])
        return [] if halved or factor == 1.0 else [scale(public, factor)]

    passes = [Pass("C1", loss, [mask(keyed), *public_share(0)], weight=weight)]
    trained_by: dict[int, list[str]] = {k: [] for k in range(len(keys))}
    for k, name in enumerate(names):
        active = list(range(k + 1)) if cumulative else [k]
        for i in active:
            trained_by[i].append(name)
        under: list[Transform] = [keys[i] for i in active]
        if others := [regions[i] for i in range(len(keys)) if i not in active]:
            under.append(mask(_union(others)))
        for i in active:
            sharing = len(keys) - i if cumulative and tiers == "all" else 1
            factor = float(keyed_weights[k]) if keyed_weights is not None else 1 / sharing
            if halved:
                under.append(scale(regions[i], "passes"))
            if factor != 1.0:
                under.append(scale(regions[i], factor))
        when = _when(tiers, every, k, len(keys), seed)
        passes.append(Pass(name, loss, [*under, *public_share(k + 1)], weight=weight, when=when))
    update: list[UpdateTransform] = [StepUnder(keys[0])] if step_in == "C2" else []
    if every > 1 or tiers != "all":
        update += [freeze(region, unless=tuple(trained_by[k])) for k, region in enumerate(regions)]
    return Method(passes, update=update)


def _when(tiers: Tiers, every: int, k: int, count: int, seed: int) -> Schedule | None:
    if tiers == "sampled" and count > 1:
        return sample_one(seed)
    if tiers == "round_robin" and count > 1:
        return every_kth(count, offset=k)
    return every_kth(every) if every > 1 else None


def _union(regions: Sequence[Region]) -> Region:
    out = regions[0]
    for region in regions[1:]:
        out = out | region
    return out


def _check(
    keys: list[PermutationKey],
    every: int,
    tiers: str,
    public: Sequence[float] | None,
    keyed: Sequence[float] | None,
    step_in: str,
) -> None:
    if not keys or not all(isinstance(key, PermutationKey) for key in keys):
        raise PlanError("tiered takes a gs.PermutationKey, or a list of disjoint ones.")
    for name, value, options in (
        ("tiers", tiers, ("all", "sampled", "round_robin")),
        ("step_in", step_in, ("C1", "C2")),
    ):
        if value not in options:
            raise PlanError(f"tiered: {name} is one of {', '.join(options)}, not {value!r}.")
    if type(every) is not int or every < 1:
        raise PlanError(f"tiered: every is a positive number of steps, not {every!r}.")
    if tiers != "all" and (every > 1 or len(keys) == 1):
        raise PlanError(
            f"tiered: tiers={tiers!r} chooses one of several keyed tiers in each step; give several keys and every=1."
        )
    if step_in == "C2" and len(keys) > 1:
        raise PlanError("tiered: with several keyed tiers there is no one C2 to step in; step in C1.")
    for name, weights, count in (("public_weights", public, len(keys) + 1), ("keyed_weights", keyed, len(keys))):
        if weights is not None and len(weights) != count:
            raise PlanError(f"tiered: {name} has one number a tier, {count}, not {len(weights)}.")
