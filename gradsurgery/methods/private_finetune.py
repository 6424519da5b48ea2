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
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss, Reference
from gradsurgery.transforms import decay_to, freeze, mask
from gradsurgery.transforms.stages import UpdateTransform


def private_finetune(
    key: PermutationKey,
    anatomy: Anatomy,
    kl_weight: float = 0.1,
    reference: Reference | None = None,
    anchors: Sequence[PermutationKey] = (),
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
    if isinstance(kl_weight, bool) or not isinstance(kl_weight, (int, float)) or not 0 <= kl_weight <= 1:
        raise PlanError(f"private_finetune: kl_weight is a number from 0 to 1, not {kl_weight!r}.")
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
    update: list[UpdateTransform] = [decay_to(keyed, rate=l2)] if l2 else []
    return Method(passes, update=[*update, freeze(public)])
