"""Which rows of an activation belong to tokens that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gradsurgery.errors import BatchError
from gradsurgery.losses.causal_lm import IGNORED

Positions = Literal["all", "response"]


class Counted:
    """The positions of one batch that count: attended ones, of the response only, without the first of every row.

    Args:
        batch: ``attention_mask`` (and ``decoder_attention_mask``) leave padding out; ``labels`` name the response.
        positions: ``"all"``, or ``"response"``: tokens that have a label.
        skip_first: Attended tokens at the start of every row that do not count (a BOS token's activations may be a
            thousand times as large as all others).
        decoder: The model is an encoder-decoder; ``labels`` are the decoder's.

    Raises:
        BatchError: no labels where the response is asked for, labels or masks that do not fit, nothing that counts.
    """

    def __init__(self, batch: Mapping[str, Any], positions: Positions, skip_first: int, decoder: bool) -> None:
        self.masks: list[Tensor] = []
        tokens = next((batch[k] for k in ("input_ids", "inputs_embeds") if isinstance(batch.get(k), Tensor)), None)
        labels, attended = batch.get("labels"), batch.get("attention_mask")
        by_token = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
        if positions == "response" and not by_token:
            have = ", ".join(map(str, batch)) or "nothing"
            raise BatchError(f'positions="response" needs labels [batch, token], -100 elsewhere; the batch has {have}.')
        if tokens is not None and tokens.dim() > 1:
            shape = tuple(tokens.shape[:2])
            if isinstance(attended, Tensor) and tuple(attended.shape) != shape:
                raise BatchError(
                    f"attention_mask is {list(attended.shape)} and the tokens are {list(shape)}; which positions are "
                    f"padding must be known: give a mask [batch, token]."
                )
            mask = attended != 0 if isinstance(attended, Tensor) else tokens.new_ones(shape, dtype=torch.bool)
            if positions == "response" and not decoder:
                assert isinstance(labels, Tensor)
                if tuple(labels.shape) != shape:
                    raise BatchError(f"labels are {list(labels.shape)}, the tokens {list(shape)}.")
                mask = mask & (labels != IGNORED).to(mask.device)
            if skip_first:
                attended = attended != 0 if isinstance(attended, Tensor) else torch.ones_like(mask)
                mask = mask & (attended.cumsum(1) > skip_first)
            self.masks.append(torch.zeros_like(mask) if positions == "response" and decoder else mask)
        if decoder:
            own = batch.get("decoder_attention_mask")
            own = own if isinstance(own, Tensor) else labels != IGNORED if isinstance(labels, Tensor) else None
            if isinstance(own, Tensor):
                self.masks.append((own != 0) & (own.cumsum(1) > skip_first) if skip_first else own != 0)
        self.everything = all(bool(mask.all()) for mask in self.masks)
        if self.masks and not any(bool(mask.any()) for mask in self.masks):
            raise BatchError(
                f"no position of this batch counts: positions={positions!r}, skip_first={skip_first}, and the masks "
                f"leave {sum(mask.numel() for mask in self.masks)} positions out."
            )

    def rows(self, lead: tuple[int, ...], name: str) -> Tensor | None:
        """Bool over the flattened leading dimensions of a module's input; ``None`` where every row counts.

        Raises:
            BatchError: some positions do not count, and which rows they are cannot be told.
        """
        if self.everything:
            return None
        total = 1
        for n in lead:
            total *= n
        fitting = [mask for mask in self.masks if mask.numel() == total and lead[-1] in (mask.shape[1], total)]
        if len(fitting) > 1 and not torch.equal(*fitting[:2]):
            raise BatchError(
                f"{name} reads {list(lead)} rows, which may be the encoder's or the decoder's; pad them to different "
                f"lengths."
            )
        if fitting:
            return fitting[0].flatten()
        if self.masks and lead == (self.masks[0].shape[0],):
            return self.masks[0].any(1)
        have = " or ".join(str(list(mask.shape)) for mask in self.masks)
        raise BatchError(
            f"{name} reads rows {list(lead)} that are no tokens {have}, so padding cannot be left out; leave the "
            f"module out (modules=…), or give batches in which every position counts."
        )
