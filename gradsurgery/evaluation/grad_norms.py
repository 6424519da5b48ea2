"""Relative gradient norms of groups of parameter entries for kinds of data (SGTM, arXiv 2512.05648, figure 4b).

If what a group holds is localised, text of one kind gives that group large gradients and the others small ones, without
any label being used: forget text pulls at the forget units even where nobody told it to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from gradsurgery.errors import DataError

Entries = Mapping[str, Tensor | None]
"""Parameter name -> bool mask of its shape (or one that broadcasts to it); ``None`` takes the whole parameter."""


def relative_grad_norms(
    model: nn.Module,
    groups: Mapping[str, Entries],
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """``{group: {kind: [|g| / |theta| for each batch]}}``, g and theta restricted to the group's entries.

    Gradients that the parameters hold already are put back afterwards; the model's mode is left as it is.

    Args:
        model: The model; nothing of it is changed.
        groups: Name -> entries, such as ``{"forget": …, "retain": …}``.
        batches: Kind of data -> batches of it. One sequence a batch shows the spread between sequences.
        loss: ``loss(model, batch)``; by default the causal language-model loss on ``input_ids`` and ``labels``.

    Raises:
        DataError: a group names no entry, an unknown parameter, or holds nothing but zeros.
    """
    loss = loss or _causal_loss
    parameters = dict(model.named_parameters())
    scales = {
        name: _norm({n: parameters[n] for n in entries}, entries) for name, entries in _checked(groups, parameters)
    }
    for name, scale in scales.items():
        if scale == 0:
            raise DataError(f"group {name!r} holds nothing but zeros: a gradient has no size relative to them.")
    needed = [name for name in parameters if any(name in entries for entries in groups.values())]
    norms: dict[str, dict[str, list[float]]] = {group: {kind: [] for kind in batches} for group in groups}
    for kind, of_kind in batches.items():
        for batch in of_kind:
            grads = torch.autograd.grad(loss(model, batch), [parameters[n] for n in needed], allow_unused=True)
            named = {name: grad for name, grad in zip(needed, grads, strict=True) if grad is not None}
            for group, entries in groups.items():
                norms[group][kind].append(_norm(named, entries) / scales[group])
    return norms


def _norm(tensors: Mapping[str, Tensor], entries: Entries) -> float:
    """Euclidean norm over the entries: each tensor's in fp32, added up in fp64 and scaled, so no square overflows."""
    parts = []
    for name, mask in entries.items():
        if name in tensors:
            tensor = tensors[name].detach().float()
            parts.append(torch.linalg.vector_norm(tensor if mask is None else tensor.masked_fill(~mask, 0)))
    return torch.stack(parts).double().norm().item() if parts else 0.0


def _checked(groups: Mapping[str, Entries], parameters: Mapping[str, nn.Parameter]) -> Iterable[tuple[str, Entries]]:
    for group, entries in groups.items():
        if not entries:
            raise DataError(f"group {group!r} names no parameter.")
        for name, mask in entries.items():
            if name not in parameters:
                raise DataError(f"group {group!r}: the model has no parameter {name!r} (tied weights have one name).")
            if not parameters[name].requires_grad:
                raise DataError(f"group {group!r}: parameter {name!r} does not train and has no gradient.")
            if mask is not None and mask.dtype != torch.bool:
                raise DataError(f"group {group!r}: the mask of {name!r} is {mask.dtype}, expected bool.")
        yield group, entries


def _causal_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    known = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
    computed: Tensor = model(**{"labels": batch["input_ids"], **known}).loss
    return computed
