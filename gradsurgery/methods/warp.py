"""WaRP: finetune without moving what other data needs, in coordinates made of its activations.

Kim et al. 2023 (ICLR, "Warping the space": weights of few-shot class-incremental learning); for the safety of language
models WSR-Tune, "Rethinking LLM fine-tuning via weight space reparameterization".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from gradsurgery.errors import PlanError, SelectionError
from gradsurgery.estimators import Basis, Coordinates, Importance, top_k
from gradsurgery.losses import causal_lm
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss
from gradsurgery.transforms import freeze, mask
from gradsurgery.transforms.rotate import rotate
from gradsurgery.transforms.stages import UpdateTransform

Important = Importance | Mapping[str, Tensor]
Others = Literal["train", "freeze"]


def warp(
    basis: Basis,
    important: Important,
    ratio: float = 0.1,
    scope: Literal["layer", "global"] = "layer",
    others: Others = "train",
    gradient: bool = False,
    loss: Loss = causal_lm,
    passes: Sequence[Pass] | None = None,
) -> Method:
    """Train on new data, and keep the coordinates that matter for the old where they are.

    Args:
        basis: From ``gs.estimators.activation_basis`` on the data to protect; LoRA factors are linear layers too.
        important: Importances on that data, of which the ``ratio`` largest are kept; or masks:
            ``gs.estimators.top_k(…)``, and what can be made of them: ``first | second`` for several tasks, ``first -
            second`` for what the first needs and the second does not.
        ratio, scope: Where importances are given: share that is kept, per weight or of all together.
        others: ``"train"`` lets every other parameter learn as well (the originals' variant that writes the kept
            coordinates back after each step); ``"freeze"`` trains the weights of the basis alone (the published one;
            with adapters nothing else trains anyway).
        gradient: Take the kept coordinates out of the gradient too, before a clip and the moments see it.
        loss: Loss on the new data.
        passes: Instead of one pass with that loss.

    Raises:
        PlanError: no basis, or nothing that says what is important.
        SelectionError: masks that name nothing, or lack weights of the basis.
        ArtefactError: importances or masks of another basis.

    Example:
        >>> basis = gs.estimators.activation_basis(model, [batch], "mlp")
        >>> scores = gs.estimators.importance(model, basis, [batch])
        >>> method = gs.methods.warp(basis, gs.estimators.top_k(scores, 0.1))
        >>> surgery = gs.attach(method, model, torch.optim.AdamW(model.parameters()))
        >>> list(surgery.backward(batch))
        ['warp']
        >>> surgery.remove()
    """
    if not isinstance(important, Mapping | Importance):
        raise PlanError(f"warp takes importances or masks, not {type(important).__name__}.")
    masks = top_k(important, ratio, scope) if isinstance(important, Importance) else important
    own = {basis.canonical(name) for name in masks}
    if missing := [name for name in basis if name not in own]:
        raise SelectionError(
            f"warp: the masks lack {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}, which the "
            f"basis speaks of; nothing would be kept there. Make the basis of fewer weights, or give empty masks."
        )
    return keeping("warp", Coordinates(basis, masks), others, gradient, loss, passes)


def keeping(
    name: str,
    coordinates: Coordinates,
    others: Others,
    gradient: bool,
    loss: Loss,
    passes: Sequence[Pass] | None,
) -> Method:
    """Train with some coordinates kept where they are.

    Raises:
        SelectionError: there are none.
    """
    if others not in ("train", "freeze"):
        raise PlanError(f'{name}: others is "train" or "freeze", not {others!r}.')
    if not coordinates.count():
        raise SelectionError(f"{name}: the masks name no coordinate, so nothing would be kept.")
    update: list[UpdateTransform] = [rotate(coordinates.basis, freeze(coordinates), at="update", gradient=gradient)]
    rest = coordinates.basis.rest
    if others == "freeze" and rest:
        if passes is not None:
            raise PlanError(
                f'{name}: with passes of your own, put gs.mask of the others under them instead of others="freeze".'
            )
        return Method([Pass(name, loss, under=[mask(rest)])], update=[*update, freeze(rest)])
    return Method(passes if passes is not None else [Pass(name, loss)], update=update)
