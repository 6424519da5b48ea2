"""Private finetuning of a keyed tier: only keyed entries move, and the public tier is held to what it was.

``L = (1 - lambda) * CE(C2, private) + lambda * KL(C1 as it was || C1, public)``; El Feghali et al. 2026, arXiv
2606.21638.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradsurgery.anatomy import Anatomy
from gradsurgery.errors import PlanError
from gradsurgery.keys import PermutationKey
from gradsurgery.keys.reference import KeyedSnapshot
from gradsurgery.losses import causal_lm, kl_divergence, snapshot
from gradsurgery.surgery import Method, Pass, sample_one
from gradsurgery.surgery.passes import Loss, Reference
from gradsurgery.transforms import decay_to, freeze, mask
from gradsurgery.transforms.stages import UpdateTransform

DECOYS = 1
"""Seed of the schedule that draws one decoy a step."""


def private_finetune(
    key: PermutationKey,
    anatomy: Anatomy,
    kl_weight: float = 0.1,
    reference: Reference | None = None,
    anchors: Sequence[PermutationKey] = (),
    decoys: int = 0,
    decoy_weight: float = 0.3,
    decoy_fraction: float = 0.5,
    l2: float = 0.0,
    permute: bool = True,
    loss: Loss = causal_lm,
    divergence: Loss = kl_divergence,
) -> Method:
    """Train the keyed entries on ``batch["private"]`` in C2, and hold C1 to its frozen self on ``batch["public"]``.

    Args:
        key: The key of the tier that is finetuned.
        anatomy: The model's anatomy.
        kl_weight: ``lambda``: weight of the divergence, a mean over tokens (the originals sum over tokens, so theirs
            corresponds to this one times the sequence length); ``1 - lambda`` is the private loss's. 0 leaves it out.
        reference: What C1 is held to; by default a snapshot of the keyed entries at attach, all that can move.
        anchors: Keys of tiers finetuned earlier; each is held to its frozen self on ``batch["public"]`` as C1 is, and
            they share ``kl_weight`` equally.
        decoys: Number of partial keys that are held to what they opened before: each step draws one of them and adds
            ``decoy_weight`` times the divergence on ``batch["private"]`` under it. Without them, half of the key opens
            about half of what was learned; with them far less, also halves that were not among them. Not in the
            originals.
        decoy_weight, decoy_fraction: Their weight, and the share of the key's swaps that each of them has.
        l2: Decoupled decay of the keyed entries towards zero, per unit of learning rate.
        permute: ``False`` trains the keyed entries where they stand in C1, as a control of what the key adds.
        loss: Loss on the private batch.
        divergence: Loss on the public batch, with ``refs["reference"]``.

    Raises:
        PlanError: ``kl_weight`` outside 0 to 1, or anchors without it.
        SelectionError, ArtefactError: keys that do not fit the model.

    Example:
        >>> key = gs.PermutationKey.generate(anatomy, fraction=0.2, seed=0)
        >>> surgery = gs.attach(gs.methods.private_finetune(key, anatomy), model, torch.optim.AdamW(model.parameters()))
        >>> sorted(surgery.backward({"private": batch, "public": batch}))
        ['private', 'public']
        >>> surgery.remove()
    """
    for one in (key, *anchors):
        if not isinstance(one, PermutationKey):
            raise PlanError(f"private_finetune takes a gs.PermutationKey, and such as anchors, not {one!r}.")
    if isinstance(kl_weight, bool) or not isinstance(kl_weight, (int, float)) or not 0 <= kl_weight <= 1:
        raise PlanError(f"private_finetune: kl_weight is a number from 0 to 1, not {kl_weight!r}.")
    if type(decoys) is not int or decoys < 0:
        raise PlanError(f"private_finetune: decoys is a number of partial keys, not {decoys!r}.")
    if decoys and not 0 < decoy_fraction < 1:
        raise PlanError(f"private_finetune: decoy_fraction lies between 0 and 1, not {decoy_fraction!r}.")
    if anchors and not kl_weight:
        raise PlanError("private_finetune: anchors share kl_weight, and it is 0.")
    keyed = key.region(anatomy)
    public = ~keyed
    kept = snapshot(keyed)
    share = kl_weight / (1 + len(anchors))
    passes = []
    if kl_weight:
        refs = {"reference": reference if reference is not None else kept}
        passes.append(Pass("public", divergence, [mask(public)], stream="public", weight=share, refs=refs))
    for k, anchor in enumerate(anchors):
        anchor.validate(anatomy)
        under, refs = [anchor, mask(public)], {"reference": KeyedSnapshot(kept, anchor)}
        passes.append(Pass(f"anchor {k + 1}", divergence, under, stream="public", weight=share, refs=refs))
    if kl_weight < 1:
        under = [key, mask(public)] if permute else [mask(public)]
        passes.append(Pass("private", loss, under, stream="private", weight=1 - kl_weight))
    for k in range(decoys):  # drawn from a seed: they tell no more than the key does
        part = key.subset(decoy_fraction, seed=k)
        part.validate(anatomy)
        under, refs = [part, mask(public)], {"reference": KeyedSnapshot(kept, part)}
        when = sample_one(DECOYS)
        passes.append(Pass(f"decoy {k + 1}", divergence, under, "private", weight=decoy_weight, when=when, refs=refs))
    update: list[UpdateTransform] = [decay_to(keyed, rate=l2)] if l2 else []
    return Method(passes, update=[*update, freeze(public)])
