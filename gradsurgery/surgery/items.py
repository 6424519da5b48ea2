"""How many items (loss tokens, examples) a loss is a mean over: then micro-batches and ranks add up to one batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.errors import BatchError
from gradsurgery.losses.causal_lm import IGNORED, count_tokens
from gradsurgery.surgery.batches import PassBatch, batch_for, batch_size
from gradsurgery.surgery.passes import Pass

NumItems = int | Tensor | Mapping[str, "int | Tensor"]


def items_of(loss: Any, share: PassBatch, model: nn.Module) -> Tensor:
    """Items that a loss of a pass is a mean over; 0 where its ``rows`` flag nobody.

    A loss may say so itself by an attribute ``count(batch)`` or ``count(batch, model)``; otherwise they are the
    labelled tokens.
    """
    batch = share.batch
    labels = batch.get("labels")
    shifted = not getattr(loss, "takes_labels", False) or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if hasattr(loss, "count"):
        takes_model = "model" in inspect.signature(loss.count).parameters
        items = torch.as_tensor(loss.count(batch, model) if takes_model else loss.count(batch))
    elif isinstance(labels, Tensor) and (labels.dim() < 2 or not shifted):
        items = (labels != IGNORED).sum()
    elif labels is None and "input_ids" not in batch:
        items = torch.tensor(batch_size(batch))
    else:
        items = count_tokens(batch)
    return items * share.share


def per_item(items: Tensor, num_items: NumItems, loss: str) -> Tensor:
    """This batch's share of the window's items."""
    if isinstance(num_items, Mapping):
        if loss not in num_items:
            raise BatchError(f"num_items has {', '.join(num_items) or 'nothing'}, and none for the loss {loss!r}.")
        num_items = num_items[loss]
    return items / torch.as_tensor(num_items, device=items.device).clamp(min=1e-9)


def count_items(
    passes: Iterable[Pass], batches: Sequence[Mapping[str, Any]], model: nn.Module, known: frozenset[str], average: bool
) -> dict[str, Tensor]:
    """Items of every loss over all micro-batches of a window, averaged over ranks (they are gradients' weights)."""
    out: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    zero = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    for p in passes:
        shares = [batch_for(p, batch, model, known) for batch in batches]
        for name, loss in p.losses.items():
            out[name] = sum((items_of(loss, share, model).to(zero) for share in shares), zero)
    if average and out and dist.is_available() and dist.is_initialized():
        counts = torch.stack(list(out.values()))
        dist.all_reduce(counts)
        out = dict(zip(out, counts / dist.get_world_size(), strict=True))
    return out
