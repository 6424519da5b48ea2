"""KL divergence of the model from a reference, the anchor of finetuning (Ziegler et al. 2019, arXiv 1909.08593)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery.errors import BatchError, PlanError
from gradsurgery.losses.divergence import work_dtype
from gradsurgery.losses.positions import count_positions, is_encoder_decoder, mask_of
from gradsurgery.losses.references.base import ReadOnce
from gradsurgery.losses.top_k import TopK
from gradsurgery.tensors import is_sharded


@dataclass(frozen=True)
class KLDivergence:
    """Mean KL divergence in nats over the positions with ``attention_mask``; made by `kl`.

    KL(p ‖ q) = Σ p log(p / q) over the vocabulary, p the reference's and q the model's distribution of a position,
    unshifted and independent of labels. The gradient is zero at all other positions, whatever they hold.
    """

    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    mask: str | None = None
    reference: str = "reference"
    chunk_size: int | None = None
    padding: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise PlanError(f"kl: temperature is a positive number, not {self.temperature!r}.")
        if self.direction not in ("forward", "reverse"):
            raise PlanError(f'kl: direction is "forward", KL(reference ‖ model), or "reverse", not {self.direction!r}.')
        if self.chunk_size is not None and (not isinstance(self.chunk_size, int) or self.chunk_size < 1):
            raise PlanError(f"kl: chunk_size is a positive number of logits, or None, not {self.chunk_size!r}.")
        if self.padding and self.mask is not None:
            raise PlanError(f"kl: padding=True counts every position, and mask={self.mask!r} some; give one of them.")

    @property
    def __name__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"kl({', '.join(changed)})" if changed else "kl_divergence"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the batch that the loss reads and the model need not take."""
        return (self.mask,) if self.mask is not None and self.mask != "labels" else ()

    def count(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> int | Tensor:
        """Positions that the loss is a mean over.

        Without a model, an encoder-decoder is known by ``decoder_…`` columns or labels of another shape than the input.
        """
        return count_positions(batch, self.mask, model, self.padding)

    def __call__(self, outputs: Any, batch: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
        logits = logits_of(outputs, "the model's outputs")
        if logits.dim() not in (2, 3):
            raise BatchError(
                f"kl_divergence takes logits [batch, token, vocabulary] or [batch, classes], not {list(logits.shape)}."
            )
        if refs.get(self.reference) is None:
            raise BatchError(
                f"kl_divergence needs refs={{{self.reference!r}: …}}: gs.losses.snapshot(region), adapters_off(), "
                f"frozen(model) or cached(path), or logits; given are {', '.join(refs) or 'none'}."
            )
        reference = refs[self.reference]
        if not isinstance(reference, TopK):
            reference = logits_of(reference, f"the reference {self.reference!r}")
        require_fit(logits, reference)
        if isinstance(reference, TopK) and reference.temperature != self.temperature:
            raise BatchError(
                f"the top-k reference was made at temperature {reference.temperature}, the loss asks for "
                f"{self.temperature}, and its rest cannot be tempered; precompute it at that temperature."
            )
        mask = self._mask(outputs, batch, logits)
        counted = mask if mask is not None else torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        options = (float(self.temperature), self.direction == "reverse", self.chunk_size or 0)
        if isinstance(reference, TopK):
            kl = self._over_outcomes(logits, reference.to(logits.device), counted)
        else:
            reference = reference.detach().to(logits.device)
            once = isinstance(refs, ReadOnce)
            kl = torch.ops.gradsurgery.kl_divergence(logits, reference, counted, *options, once)[0]
        return kl.sum() / counted.sum().clamp(min=1)

    def _mask(self, outputs: Any, batch: Mapping[str, Any], logits: Tensor) -> Tensor | None:
        if self.padding or (logits.dim() == 2 and self.mask is None):
            return None
        mask = mask_of(batch, self.mask, is_encoder_decoder(batch, outputs=outputs))
        if mask is not None and mask.shape != logits.shape[:-1]:
            raise BatchError(
                f"the logits have positions {list(logits.shape[:-1])}, the mask {list(mask.shape)}; name a column that "
                f"fits the logits: gs.losses.kl(mask=…)."
            )
        return mask.to(logits.device) if mask is not None else None

    def _over_outcomes(self, logits: Tensor, reference: TopK, counted: Tensor) -> Tensor:
        """KL over the words of the reference and the rest of the vocabulary, by position."""
        options = (float(self.temperature), self.chunk_size or 0)
        log_q = torch.ops.gradsurgery.top_log_softmax(logits, reference.indices, counted, *options)[0]
        log_p = reference.outcomes(work_dtype(logits, reference.log_probs))
        first, second = (log_q, log_p) if self.direction == "reverse" else (log_p, log_q)
        impossible = (first == -torch.inf) | ~counted.unsqueeze(-1)  # they count for nothing: 0 * inf is nan
        first, second = first.masked_fill(impossible, 0.0), second.masked_fill(impossible, 0.0)
        return (first.exp() * (first - second)).masked_fill(impossible, 0.0).sum(-1)


def logits_of(given: Any, what: str) -> Tensor:
    """Logits, of a model's outputs or as they are; of a sharded vocabulary they are gathered.

    Raises:
        BatchError: there are none.
    """
    logits = given if isinstance(given, Tensor) else getattr(given, "logits", None)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise BatchError(f"a loss against a reference needs logits; {what} ({type(given).__name__}) have none.")
    return logits.full_tensor() if is_sharded(logits) else logits  # type: ignore[attr-defined]


def require_fit(logits: Tensor, reference: Tensor | TopK) -> None:
    """Raise a `BatchError` unless a reference speaks of the model's words and positions."""
    vocabulary = reference.vocabulary if isinstance(reference, TopK) else reference.shape[-1]
    rows = reference.rest.shape if isinstance(reference, TopK) else reference.shape[:-1]
    if vocabulary != logits.shape[-1]:
        raise BatchError(
            f"the reference speaks of {vocabulary} words, the model of {logits.shape[-1]}: they need one "
            f"tokenizer. If one embedding is only padded, resize_token_embeddings makes them equal."
        )
    if rows != logits.shape[:-1]:
        raise BatchError(
            f"the reference has positions {list(rows)}, the model {list(logits.shape[:-1])}: both must read the "
            f"same batch (prompts and prefixes that one of them adds are positions too)."
        )


def kl(
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    mask: str | None = None,
    reference: str = "reference",
    chunk_size: int | None = None,
    padding: bool = False,
) -> KLDivergence:
    """`kl_divergence` with options.

    Args:
        temperature: Divides both logits. The loss is the divergence itself; for distillation's usual factor give the
            pass ``weight=temperature**2`` (Hinton et al. 2015, arXiv 1503.02531).
        direction: ``"forward"``, KL(reference ‖ model), covers the reference's modes; ``"reverse"``,
            KL(model ‖ reference), seeks one of them.
        mask: Column of the batch with the positions that count, e.g. ``"completion_mask"``, or ``"labels"`` for those
            that are not ``-100``.
        reference: Name in ``refs``.
        chunk_size: Logits in a block of work; ``None`` fits it to the device.
        padding: Every position counts, also those without ``attention_mask``, at which a model's outputs mean nothing:
            for comparisons with code that does so. A cache holds no such positions.

    Raises:
        PlanError: an option out of range.

    Example:
        >>> loss = gs.losses.kl(temperature=2.0, direction="reverse")
        >>> out = model(**batch)
        >>> loss(out, batch, {"reference": out.logits.detach()}).item()
        0.0
    """
    return KLDivergence(temperature, direction, mask, reference, chunk_size, padding)


_PLAIN = KLDivergence()


def kl_divergence(outputs: Any, batch: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
    """Mean KL(reference ‖ model) in nats over the positions with ``attention_mask``, unshifted; in fp32.

    Computed in blocks over tokens and vocabulary: besides the two logits, nothing of their size is kept for the
    backward, which writes ``mask / N * (softmax(model) - softmax(reference))`` into one gradient of the logits' dtype.

    Args:
        outputs: Model outputs with ``logits`` ``[batch, token, vocabulary]`` (a decoder's, after an encoder), or
            ``[batch, classes]``, one position per row.
        batch: Positions that count: ``attention_mask``; in an encoder-decoder ``decoder_attention_mask``, or where
            ``labels`` are not ``-100``. All positions where there is none.
        refs: ``refs["reference"]``: logits or log-probabilities, outputs with ``logits``, or a `TopK`.

    Raises:
        BatchError: no reference, another vocabulary, or positions that differ.

    Example:
        >>> reference = gs.losses.snapshot(anatomy.neurons[:, :16])
        >>> p = gs.Pass("public", gs.losses.kl_divergence, refs={"reference": reference})
    """
    return _PLAIN(outputs, batch, refs)


kl_divergence.count = _PLAIN.count  # type: ignore[attr-defined]
