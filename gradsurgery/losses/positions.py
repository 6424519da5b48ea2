"""Which positions a loss that needs no labels is a mean over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import BatchError
from gradsurgery.losses.causal_lm import IGNORED

TOKENS = ("input_ids", "inputs_embeds")
DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")


def is_encoder_decoder(batch: Mapping[str, Any], model: nn.Module | None = None, outputs: Any = None) -> bool:
    """Whether logits belong to a decoder that reads other tokens than ``input_ids``: model, outputs or batch tell."""
    if model is not None:
        return bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))
    if outputs is not None:
        return hasattr(outputs, "encoder_last_hidden_state")
    labels, ids = batch.get("labels"), batch.get("input_ids")
    differ = isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.dim() == 2 and labels.shape != ids.shape
    return differ or any(name.startswith("decoder_") for name in batch)


def mask_of(batch: Mapping[str, Any], column: str | None, decoder: bool) -> Tensor | None:
    """The positions that count, bool, ``[batch, token]`` as a rule; None where all do.

    Args:
        column: Name of the mask in the batch (``labels``: those that are not ``-100``). ``None`` is ``attention_mask``,
            in a decoder of an encoder ``decoder_attention_mask``, or else ``labels``.

    Raises:
        BatchError: no such column, or an attention mask that is not ``[batch, token]``.
    """
    name = column or ("decoder_attention_mask" if decoder else "attention_mask")
    if decoder and not column and batch.get(name) is None:
        name = "labels"
    mask = batch.get(name)
    if mask is None and column is None:
        return None
    if not isinstance(mask, Tensor):
        raise BatchError(
            f"the mask {name!r} is a tensor [batch, token], not {type(mask).__name__}; the batch has {_names(batch)}."
        )
    if mask.dim() > 2:
        raise BatchError(
            f"{name} is {list(mask.shape)} and does not say which positions count; name a column [batch, token] that "
            f"does: gs.losses.kl(mask=…)."
        )
    return mask != IGNORED if name == "labels" else mask != 0


def count_positions(
    batch: Mapping[str, Any], column: str | None = None, model: nn.Module | None = None, padding: bool = False
) -> int | Tensor:
    """How many positions of a batch count: those of `mask_of`, or rows where a batch has labels by row or no tokens.

    With ``padding`` all of them do.
    """
    labels = batch.get("labels")
    decoder = is_encoder_decoder(batch, model)
    by_row = isinstance(labels, Tensor) and (labels.dim() < 2 or labels.is_floating_point())
    names = DECODER_TOKENS if decoder else TOKENS
    tokens = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
    if column is None and (by_row or (tokens is None and not decoder)):
        rows = [x.shape[0] for x in batch.values() if isinstance(x, Tensor) and x.dim()]
        if not rows:
            raise BatchError(f"the batch holds no tensor with rows: it has {_names(batch)}.")
        return rows[0]
    if (mask := mask_of(batch, column, decoder)) is not None:
        return mask.numel() if padding else mask.sum()
    if tokens is None:
        raise BatchError(f"no decoder positions to count: the batch has {_names(batch)}; give it labels.")
    return tokens.shape[0] * tokens.shape[1]


def _names(batch: Mapping[str, Any]) -> str:
    return ", ".join(map(str, batch)) or "nothing"
