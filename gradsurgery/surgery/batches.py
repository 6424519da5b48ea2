"""From a user's batch to what one pass sees: sub-batch, rows, label columns, model inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import BatchError
from gradsurgery.losses.cross_entropy import IGNORED
from gradsurgery.surgery.passes import Pass
from gradsurgery.transforms.engine.run import check_column


@dataclass(frozen=True)
class PassBatch:
    """One pass's share of a batch.

    Attributes:
        batch: What losses see: everything but the label columns.
        inputs: What the model is called with.
        columns: The label columns by name.
        share: 0 where ``rows`` flags nobody here, or another rank has all the rows: a row runs all the same, so that
            every rank builds the same graph.
    """

    batch: dict[str, Any]
    inputs: dict[str, Any]
    columns: dict[str, Tensor]
    share: float = 1.0


def batch_for(
    p: Pass, batch: Mapping[str, Any], model: nn.Module, known_columns: frozenset[str], compiled: bool = False
) -> PassBatch:
    """Cut a batch down to what a pass needs.

    ``compiled``: the host is. Then the number of rows that a pass takes is marked as one that varies, and where it
    takes none two run: a single row is a graph of its own.

    Raises:
        BatchError: no rows, a missing stream or label column, labels of wrong shape or dtype.
    """
    if p.stream is not None:
        if not isinstance(batch.get(p.stream), Mapping):
            have = ", ".join(map(str, batch)) or "nothing"
            raise BatchError(f"pass {p.name!r} needs batch[{p.stream!r}], a batch of its own; this batch has {have}.")
        batch = batch[p.stream]
    share = 1.0
    if not batch_size(batch):
        batch, share = stand_in(batch, p), 0.0
    size = batch_size(batch)
    columns = label_columns(p, batch)
    rest = without_labels(batch, known_columns)
    if p.rows is not None:
        chosen = columns[p.rows.removeprefix("~")]
        if chosen.dim() != 1:
            raise BatchError(f"rows={p.rows!r} of pass {p.name!r} chooses whole examples: its column must be [batch].")
        chosen = ~chosen if p.rows.startswith("~") else chosen
        if not bool(chosen.any()):
            chosen, share = torch.arange(size, device=chosen.device) < 1 + compiled, 0.0
        rest = {k: _rows(v, chosen, size, compiled) for k, v in rest.items()}
        columns = {k: _rows(v, chosen, size, compiled) for k, v in columns.items()}
    return PassBatch(rest, model_inputs(p, rest, unwrap(model)), columns, share)


def stand_in(batch: Mapping[str, Any], p: Pass) -> dict[str, Any]:
    """One row of zeros in place of none, where other ranks have rows and would wait for this one.

    Raises:
        BatchError: there are no other ranks, nothing tells what a row is like, stored references would be read of it,
            or the model's own loss, a mean over no label, would be taken of it.
    """
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rows = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.shape[:1] == (0,)}
    reads = any(getattr(reference, "columns", ()) for reference in p.refs.values())
    reads = reads or any(getattr(loss, "takes_labels", False) for loss in p.losses.values())
    if not shared or reads or any(0 in value.shape[1:] for value in rows.values()):
        raise BatchError(f"the batch of pass {p.name!r} has no rows; skip empty batches (in a loader, drop_last=True).")
    fill = {"labels": IGNORED, "attention_mask": 1, "decoder_attention_mask": 1}
    made = {key: value.new_full((1, *value.shape[1:]), fill.get(key, 0)) for key, value in rows.items()}
    return {**batch, **made}


def label_columns(p: Pass, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The label columns that a pass reads, checked against the batch they came with."""
    columns: dict[str, Tensor] = {}
    known = dict.fromkeys(p.columns())
    for name in known:
        if name not in batch:
            have = ", ".join(map(str, batch)) or "nothing"
            raise BatchError(
                f"pass {p.name!r} needs the label column {name!r}, a bool tensor [batch]; the batch has {have}. "
                f"If your data set has it, the loader dropped it: with a stock Trainer set remove_unused_columns=False."
            )
        columns[name] = check_column(name, batch[name])
        others = {key: value for key, value in batch.items() if key not in known}
        size = batch_size(others) if others else columns[name].shape[0]
        if columns[name].shape[0] != size:
            raise BatchError(f"label column {name!r} has {columns[name].shape[0]} rows, the batch has {size}.")
        tokens = {v.shape[1] for v in others.values() if isinstance(v, Tensor) and v.dim() > 1}
        if columns[name].dim() == 2 and tokens and columns[name].shape[1] not in tokens:
            have = " or ".join(map(str, sorted(tokens)))
            raise BatchError(
                f"label column {name!r} is {list(columns[name].shape)}, its rows do not fit {have} tokens."
            )
    return columns


def without_labels(batch: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """What of a batch may be a model input: no label columns, no sub-batches."""
    size = batch_size(batch)
    return {k: v for k, v in batch.items() if not _is_label(k, v, known, size)}


def batch_size(batch: Mapping[str, Any]) -> int:
    for key in ("input_ids", "inputs_embeds", "pixel_values", "labels"):
        if isinstance(batch.get(key), Tensor):
            return int(batch[key].shape[0])
    sizes = [v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    if not sizes:
        raise BatchError(f"the batch holds no tensor with rows: it has {', '.join(map(str, batch)) or 'nothing'}.")
    return int(sizes[0])


def _is_label(name: str, value: Any, known: frozenset[str], size: int) -> bool:
    """Label columns of this method, and of others: bool ``[batch]`` tensors are never model inputs."""
    is_flag = isinstance(value, Tensor) and value.dtype == torch.bool and tuple(value.shape) == (size,)
    return name in known or is_flag or isinstance(value, Mapping)


def _rows(value: Any, chosen: Tensor, size: int, vary: bool) -> Any:
    if not (isinstance(value, Tensor) and value.dim() and value.shape[0] == size):
        return value
    out = value[chosen.to(value.device)]
    if vary and len(out) > 1:
        torch._dynamo.maybe_mark_dynamic(out, 0)
    return out


def model_inputs(p: Pass, batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Without ``labels`` (the pass computes its loss, unless the model must), what only losses and references read, and
    a cache."""
    parameters = inspect.signature(model.forward).parameters
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    takes_labels = encoder_decoder or any(getattr(loss, "takes_labels", False) for loss in p.losses.values())
    others = {c for reader in (*p.losses.values(), *p.refs.values()) for c in getattr(reader, "columns", ())}
    out = {k: v for k, v in batch.items() if (k != "labels" or takes_labels) and k not in others - set(parameters)}
    if "use_cache" in parameters:
        out.setdefault("use_cache", False)
    return out
