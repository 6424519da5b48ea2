"""Calibration of the output bias: forgetting that one bias undoes does not count (SGTM, arXiv 2512.05648, appendix).

A model can look as if it had forgotten a language because it gives that language's tokens a low probability wherever
it is. Before losses are compared, a bias on the output logits is therefore fitted on held-back data,

    minimise over b:   L_forget(z + b) + beta * L_adjacent(z + b) + alpha * L_retain(z + b)

with everything else frozen. The problem is convex. The bias is added by a hook on the output layer, as its own bias
would be: no model is built, and none of its weights moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradsurgery.errors import DataError
from gradsurgery.evaluation.modes import evaluating

CACHE = 2**30
"""Bytes of activations that `calibrate` keeps at most instead of running the model again."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted output bias.

    Attributes:
        bias: ``[vocabulary]``, fp32.
        temperature: What the logits are divided by, before the bias; 1 where it was not fitted.
        objective: The weighted loss of each category's first batch before and after, in nats.
    """

    bias: Tensor
    temperature: float
    objective: tuple[float, float]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model's logits are ``logits / temperature + bias``."""
        with _on_logits(model, self.bias, torch.tensor(1 / self.temperature)):
            yield


def calibrate(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    steps: int = 200,
    learning_rate: float = 1e-2,
    batch_size: int = 16,
    temperature: bool = False,
    bias_std: float = 0.1,
    seed: int = 42,
) -> Calibration:
    """Fit an output bias: AdamW without decay, the learning rate falling linearly to a tenth, one batch a category.

    Defaults are the paper's code's. The model's weights, gradients and modes are left as they were. Nothing below the
    bias changes, so that what the output layer reads is computed once and kept, where that is little enough and the
    model returns the layer's output as it is.

    Args:
        model: A causal language model after removal.
        sequences: Category -> token ids ``[sequences, length]``, held back from training and from the evaluation.
        weights: Category -> weight of its loss; the paper's are 1 for forget, 1 (bilingual) or 100 (Wikipedia) for
            adjacent, 100 for retain.
        steps: Optimizer steps.
        batch_size: Sequences a step and category; each category is gone through again and again.
        temperature: Fit one temperature, too.
        bias_std: Standard deviation of the bias at the start.
        seed: Of the start.

    Raises:
        DataError: categories that do not agree, empty ones, options out of range, a model without an output layer.

    Example:
        >>> from gradsurgery.evaluation import calibrate, evaluate
        >>> text = {"forget": batch["input_ids"], "retain": batch["input_ids"]}
        >>> found = calibrate(model, text, {"forget": 1.0, "retain": 100.0}, steps=20)
        >>> with found.applied(model):
        ...     after = evaluate(model, text)["forget"]["loss"]
        >>> after < evaluate(model, text)["forget"]["loss"]
        True
    """
    _check(sequences, weights, steps, batch_size)
    device = next(model.parameters()).device
    start = torch.randn(_vocabulary(model), generator=torch.Generator().manual_seed(seed)) * bias_std
    bias = start.to(device).requires_grad_()
    scale = torch.zeros((), device=device, requires_grad=temperature)
    groups = [bias, scale] if temperature else [bias]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=max(steps - 1, 1))

    def objective(step: int) -> Tensor:
        losses = []
        for category, ids in sequences.items():
            chosen = _rows(ids, step, batch_size)
            batch = ids[chosen].to(device).long()
            kept = None if hidden is None else hidden[category][chosen]
            losses.append(weights[category] * _loss(model, batch, kept))
        return torch.stack(losses).sum()

    with evaluating(model), _frozen(model):
        hidden = _read_by_output_layer(model, sequences, steps * batch_size, batch_size, device)
        before = float(objective(0))
        with _on_logits(model, bias, scale, exponent=True):
            for step in range(steps):
                grads = torch.autograd.grad(objective(step), groups)
                for parameter, grad in zip(groups, grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                after = float(objective(0))
    return Calibration(bias.detach(), float(torch.exp(-scale.detach())), (before, after))


def _logits(model: Any, batch: Tensor) -> Tensor:
    real = batch >= 0
    mask = {} if real.all() else {"attention_mask": real.long()}
    return model(input_ids=batch.clamp(min=0), use_cache=False, **mask).logits  # type: ignore[no-any-return]


def _loss(model: Any, batch: Tensor, hidden: Tensor | None) -> Tensor:
    logits = _logits(model, batch)[:, :-1] if hidden is None else _output_layer(model)(hidden[:, :-1])
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].masked_fill(batch[:, 1:] < 0, -100).flatten())


def _rows(ids: Tensor, step: int, size: int) -> Tensor:
    chosen = torch.arange(step * size, (step + 1) * size) % len(ids)
    return chosen.unique() if len(ids) < size else chosen


@torch.no_grad()
def _read_by_output_layer(
    model: Any, sequences: Mapping[str, Tensor], most: int, size: int, device: torch.device
) -> dict[str, Tensor] | None:
    """What the output layer reads at the first ``most`` sequences of each category, ``[sequences, length, width]``.

    ``None`` where the model does more to the logits than that layer, or there would be more than `CACHE` of it.
    """
    used = {category: ids[:most] for category, ids in sequences.items()}
    layer = _output_layer(model)
    width = layer.weight.shape[1]  # type: ignore[union-attr,index,operator]
    dtype_size = layer.weight.element_size()  # type: ignore[union-attr,operator]
    if sum(ids.numel() for ids in used.values()) * width * dtype_size > CACHE:  # type: ignore[operator]
        return None
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    kept: dict[str, Tensor] = {}
    try:
        for category, ids in used.items():
            read = []
            for rows in ids.split(size):
                seen.clear()
                logits = _logits(model, rows.to(device).long())
                if len(seen) != 1 or not torch.equal(seen[0][1], logits):
                    return None
                read.append(seen[0][0])
            kept[category] = torch.cat(read)
    finally:
        handle.remove()
    return kept


def _output_layer(model: Any) -> nn.Module:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise DataError(f"{type(model).__name__} has no output layer whose bias could be calibrated.")
    return layer  # type: ignore[no-any-return]


def _vocabulary(model: nn.Module) -> int:
    return int(_output_layer(model).weight.shape[0])  # type: ignore[union-attr,index,operator,arg-type]


@contextmanager
def _on_logits(model: nn.Module, bias: Tensor, scale: Tensor, exponent: bool = False) -> Iterator[None]:
    """Scale what the output layer returns (by ``exp(scale)`` with ``exponent``) and add the bias."""

    def hook(module: nn.Module, args: object, logits: Tensor) -> Tensor:
        factor = scale.exp() if exponent else scale
        return logits * factor.to(logits) + bias.to(logits)

    handle = _output_layer(model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient, so that a backward ends at the bias."""
    training = [p for p in model.parameters() if p.requires_grad]
    for p in training:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in training:
            p.requires_grad_(True)


def _check(sequences: Mapping[str, Tensor], weights: Mapping[str, float], steps: int, batch_size: int) -> None:
    if not sequences or set(sequences) != set(weights):
        raise DataError(
            f"calibrate needs one weight for each category: sequences of {', '.join(sequences) or 'none'}, weights of "
            f"{', '.join(weights) or 'none'}."
        )
    if empty := [name for name, ids in sequences.items() if ids.ndim != 2 or not (ids[:, 1:] >= 0).any()]:
        raise DataError(f"category {empty[0]!r} holds nothing to predict: expected token ids [sequences, length >= 2].")
    if steps < 1 or batch_size < 1:
        raise DataError(f"calibrate: steps={steps} and batch_size={batch_size} are numbers from 1.")
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        raise DataError(f"calibrate: weights are finite numbers from 0, not all of them 0; given are {dict(weights)}.")
