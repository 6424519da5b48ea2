"""Writes the log-probabilities of a data set, for `cached`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.errors import BatchError, DataError, PlanError
from gradsurgery.losses.positions import is_encoder_decoder
from gradsurgery.losses.references.base import forward_logits, model_inputs
from gradsurgery.losses.references.cached import Cached, counted_positions, row_ids
from gradsurgery.losses.references.store import Writer, row_hashes, whole_folder
from gradsurgery.losses.top_k import TopK


def precompute(
    path: str | Path,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    top_k: int | None = None,
    ids: str | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    shard_size: int = 256 << 20,
    overwrite: bool = False,
) -> Cached:
    """Store the model's log-probabilities for the rows of some batches, at the positions that losses count.

    A position takes ``vocabulary`` numbers, or ``2 top_k + 1``: 50257 words in fp32 are 200 kB, the top 64 half a kB.

    Args:
        path: Folder to write; it appears whole or not at all. One process writes it, all may read.
        model: The reference: the model before it trains, or a teacher.
        batches: Every row of the data set once, padded as you like. Columns that the model does not take are left out.
        top_k: Keep the likeliest words of every position and the mass of the rest; None keeps all words.
        ids: Column of row numbers, int ``[batch]``; without one rows are known by a hash of their ids.
        temperature: Divides the logits; a loss at another one refuses the top-k.
        dtype: What log-probabilities are stored in.
        shard_size: Bytes of a file, about; that much is held in memory.
        overwrite: Replace what is there.

    Raises:
        ArtefactError: the path exists, or cannot be written (a full disk leaves nothing behind).
        DataError: no rows, or a row number twice.
        BatchError: batches without ids to know rows by.
        PlanError: ``top_k``, ``temperature`` or ``dtype`` out of range.

    Example:
        >>> import tempfile
        >>> reference = gs.losses.precompute(tempfile.mkdtemp() + "/full", model, [batch])
        >>> reference(model, {"input_ids": batch["input_ids"]}).shape
        torch.Size([2, 8, 64])
    """
    if top_k is not None and top_k < 1:
        raise PlanError(f"precompute: top_k is at least 1, or None for all words, not {top_k}.")
    if not 0 < temperature < float("inf"):
        raise PlanError(f"precompute: temperature is a positive number, not {temperature!r}.")
    if not dtype.is_floating_point:
        raise PlanError(f"precompute: dtype is a floating-point type, not {dtype}.")
    base, path = unwrap(model), Path(path)
    decoder = is_encoder_decoder({}, model)
    device = next(base.parameters()).device
    known: set[int | bytes] = set()
    vocabulary = 0
    with whole_folder(path, overwrite) as folder:
        writer = Writer(folder, shard_size)
        for batch in batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            inputs = model_inputs(base, batch, decoder)
            counted = counted_positions(inputs, decoder)
            hashes = row_hashes(inputs, counted, decoder, numbered=ids is not None)
            keys = row_ids(batch, ids, len(hashes)) if ids else [-1] * len(hashes)
            logits = forward_logits(model, inputs)
            if logits.shape[:-1] != counted.shape:
                raise BatchError(f"the logits are {list(logits.shape)}, the positions to store {list(counted.shape)}.")
            vocabulary = logits.shape[-1]
            if top_k is not None and top_k >= vocabulary:
                raise PlanError(f"precompute: the top {top_k} of {vocabulary} words are all; leave top_k out.")
            for row, (key, hashed) in enumerate(zip(keys, hashes, strict=True)):
                if ids and key in known:
                    raise DataError(f"precompute: row number {key} ({ids}) comes twice; give every row its own.")
                if (name := key if ids else hashed) not in known:
                    known.add(name)
                    writer.add(key, hashed, _stored(logits[row][counted[row]], top_k, temperature, dtype))
        if not known:
            raise DataError("precompute: the batches hold no rows.")
        about = {"model": type(base).__name__, "fingerprint": ParameterSpace.of(base).fingerprint}
        writer.finish({**about, "vocabulary": vocabulary, "top_k": top_k, "temperature": temperature, "ids": ids})
    return Cached(path)


def _stored(logits: Tensor, top_k: int | None, temperature: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """One row's tensors, ``[position, …]``, on the CPU."""
    if top_k is None:
        log_probs = (logits if logits.dtype == torch.float64 else logits.float()).div(temperature).log_softmax(-1)
        return {"log_probs": log_probs.to("cpu", dtype)}
    top = TopK.of(logits.unsqueeze(0), top_k, temperature)
    log_probs, indices, rest = (x.squeeze(0).cpu() for x in (top.log_probs, top.indices, top.rest))
    return {"log_probs": log_probs.to(dtype).contiguous(), "indices": indices.int(), "rest": rest.float().contiguous()}
