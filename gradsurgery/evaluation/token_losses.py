"""Loss of every token, and its distribution: whether a loss is high everywhere or on a few tokens (SGTM, figure 6b)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradsurgery.errors import DataError
from gradsurgery.evaluation.modes import evaluating


@torch.no_grad()
def token_losses(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Next-token loss of every token of each category, fp32 ``[tokens]`` on the CPU, in the order of the text.

    Their mean is what ``evaluation.evaluate`` reports. Runs in eval mode and leaves the model's modes as they were.

    Args:
        model: A causal language model: ``model(input_ids=…, use_cache=False).logits``.
        sequences: Category -> token ids ``[sequences, length]``; entries below 0 are not counted.
        batch_size: Sequences in one forward.
        device: Where the batches go; by default where the model's first parameter is.

    Raises:
        DataError: a category holds nothing to predict.

    Example:
        >>> from gradsurgery.evaluation import token_losses
        >>> {name: of.shape for name, of in token_losses(model, {"text": batch["input_ids"]}).items()}
        {'text': torch.Size([14])}
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is no number of sequences: give 1 or more.")
    device = device or next(model.parameters()).device
    out = {}
    with evaluating(model):
        for category, ids in sequences.items():
            if ids.ndim != 2 or not (ids[:, 1:] >= 0).any():
                raise DataError(
                    f"category {category!r} holds nothing to predict: expected token ids [sequences, length >= 2]."
                )
            out[category] = torch.cat([_losses(model, part.to(device).long()) for part in ids.split(batch_size)])
    return out


def _losses(model: nn.Module, batch: Tensor) -> Tensor:
    real = batch >= 0
    mask = {} if real.all() else {"attention_mask": real.long()}
    logits = model(input_ids=batch.clamp(min=0), use_cache=False, **mask).logits[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), batch[:, 1:].clamp(min=0).flatten(), reduction="none")
    return losses[real[:, 1:].flatten()].cpu()


def density(values: Tensor | Sequence[float], at: Tensor | Sequence[float], bandwidth: float | None = None) -> Tensor:
    """Gaussian kernel density of some values at some points; it integrates to 1.

    ``1 / (n h) * sum_i phi((x - v_i) / h)``; h by Silverman's rule, ``0.9 * min(std, IQR / 1.34) * n ** -0.2``
    (Silverman 1986, equation 3.31).

    Args:
        values: Such as the losses of `token_losses`.
        at: Where to evaluate, ``[points]``.
        bandwidth: h, where the rule is not wanted.

    Raises:
        DataError: no values, or a bandwidth that is not positive.

    Example:
        >>> from gradsurgery.evaluation import density
        >>> density([0.0], [0.0], bandwidth=1.0)                       # 1 / sqrt(2 pi)
        tensor([0.3989], dtype=torch.float64)
    """
    v, x = torch.as_tensor(values).double().flatten(), torch.as_tensor(at).double()
    if not len(v):
        raise DataError("a density needs at least one value.")
    h = _silverman(v) if bandwidth is None else float(bandwidth)
    if not 0 < h < math.inf:
        raise DataError(f"bandwidth={h} is no positive number; values that are all equal need one given.")
    total = torch.zeros_like(x)
    for part in v.split(4096):  # not [points, values] at once
        total += torch.exp(-0.5 * ((x[..., None] - part) / h) ** 2).sum(-1)
    return total / (len(v) * h * math.sqrt(2 * math.pi))


def _silverman(values: Tensor) -> float:
    ordered = values.sort().values
    quarter = len(values) // 4  # quantile() takes no more than 16 M values
    spread = float(ordered[-1 - quarter] - ordered[quarter]) / 1.34
    std = float(values.std(correction=0))
    return 0.9 * (min(std, spread) if spread > 0 else std) * len(values) ** -0.2
