"""Loss, accuracy and perplexity of each tier, in one set of weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from gradsurgery.anatomy import Anatomy
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import DataError, KeyWarning
from gradsurgery.evaluation.losses import Score
from gradsurgery.evaluation.modes import evaluating
from gradsurgery.keys import PermutationKey, require_c1


class TierScore(Score):
    """``loss`` in nats per token, ``perplexity`` = exp(loss), ``tokens``, ``accuracy``: share of them ranked first."""

    accuracy: float


Scores = dict[str, TierScore]
"""By category of text."""
Sequences = Mapping[str, Tensor]
"""Category -> token ids ``[sequences, length]``; entries below 0 are not counted."""


@torch.no_grad()
def score(model: nn.Module, sequences: Sequences, batch_size: int = 32) -> Scores:
    """`gradsurgery.evaluation.evaluate` with accuracy: next-token means over all tokens of each category.

    Raises:
        DataError: a category holds nothing to predict.
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is no number of sequences: give 1 or more.")
    with evaluating(model):
        return {category: _score(model, category, ids, batch_size) for category, ids in sequences.items()}


def _score(model: nn.Module, category: str, sequences: Tensor, batch_size: int) -> TierScore:
    if sequences.ndim != 2 or not (sequences[:, 1:] >= 0).any():
        raise DataError(f"category {category!r} holds nothing to predict: expected token ids [sequences, length >= 2].")
    total, right, tokens = 0.0, 0, 0
    for batch in torch.split(sequences, batch_size):
        logits, targets = predictions(model, batch)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        total += losses.double().sum().item()
        right += int((logits.argmax(-1) == targets).sum())
        tokens += int((targets >= 0).sum())
    loss = total / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "tokens": tokens, "accuracy": right / tokens}


def predictions(model: nn.Module, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 logits ``[batch, length - 1, vocabulary]`` and the tokens they predict, -100 where there is none."""
    batch = sequences.to(next(model.parameters()).device).long()
    real = batch >= 0
    mask = {} if real.all() else {"attention_mask": real.long()}
    logits = model(input_ids=batch.clamp(min=0), use_cache=False, **mask).logits[:, :-1].float()
    return logits, batch[:, 1:].masked_fill(~real[:, 1:], -100)


def evaluate_tiers(
    model: nn.Module,
    key: PermutationKey | Mapping[str, PermutationKey],
    anatomy: Anatomy,
    sequences: Sequences,
    batch_size: int = 32,
    progress: bool | None = None,
) -> dict[str, Scores]:
    """``{"C1": scores, "C2": scores}``: the tiers of a model, C1 without a key.

    Args:
        model: A causal language model in C1; it is in C1 afterwards, also on an exception.
        key: The key of C2, or several by name; a tier of several keys has their `PermutationKey.compose`.
        anatomy: The model's anatomy.
        sequences: Category -> token ids ``[sequences, length]``, as `gradsurgery.evaluation.evaluate` takes them.
        batch_size: Sequences in one forward.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        KeyStateError: the model is keyed.
        DataError: a category holds nothing to predict.

    Example:
        >>> from gradsurgery.evaluation.tiers import evaluate_tiers
        >>> key = gs.PermutationKey.generate(anatomy, seed=0)
        >>> scores = evaluate_tiers(model, key, anatomy, {"text": batch["input_ids"]})
        >>> sorted(scores), sorted(scores["C2"]["text"])
        (['C1', 'C2'], ['accuracy', 'loss', 'perplexity', 'tokens'])
    """
    out: dict[str, Scores] = {}
    keys = tier_keys(key)
    with bar(len(keys), "tiers", progress) as done:
        for name, one in keys.items():
            with tier(model, one, anatomy):
                out[name] = score(model, sequences, batch_size)
            done.update()
    return out


def tier_keys(key: PermutationKey | Mapping[str, PermutationKey]) -> dict[str, PermutationKey | None]:
    """Tiers by name, C1 first.

    Raises:
        DataError: a tier is called C1.
    """
    keys = {"C2": key} if isinstance(key, PermutationKey) else dict(key)
    if "C1" in keys:
        raise DataError("C1 is the model without a key; give the keyed tiers other names.")
    return {"C1": None, **keys}


@contextmanager
def tier(model: nn.Module, key: PermutationKey | None, anatomy: Anatomy) -> Iterator[None]:
    """The model under a key inside the block, C1 without one; C1 after it. What a key warns of was said before.

    Raises:
        KeyStateError: the model is keyed already.
    """
    require_c1(unwrap(model), "evaluating tiers")
    if key is None or not len(key):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KeyWarning)
        with key.applied(model, gradients=False, anatomy=anatomy):
            yield


def bar(total: int, what: str, progress: bool | None) -> tqdm:
    """A progress bar on stderr that goes when it is done."""
    return tqdm(total=total, desc=what, leave=False, disable=None if progress is None else not progress)
