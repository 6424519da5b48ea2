"""Relearning: how many steps bring a removed ability back (the probe of SGTM: Shilov et al. 2025, arXiv 2512.05648).

What was never there is learned at the pace of a model that never saw it; what was only hidden is back at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import DataError
from gradsurgery.evaluation.token_losses import token_losses

if TYPE_CHECKING:
    from gradsurgery.surgery import Method

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Text = Tensor | tuple[Tensor, Tensor]
"""Token ids ``[sequences, length]``, where entries below 0 are padding; or such ids and their labels, which are below 0
where a token (of a prompt, say) is read, but neither learned nor measured."""


@dataclass(frozen=True)
class RelearnPoint:
    """Losses on held-back data after some steps, in nats per token."""

    step: int
    forget: float
    retain: float


@dataclass(frozen=True)
class Relearned:
    """What relearning found.

    Attributes:
        steps: The first measured step at which the forget loss is at ``level`` or below; ``None`` if it never was.
        level: The loss that counts as back.
        curve: What was measured, step 0 first.
    """

    steps: int | None
    level: float
    curve: tuple[RelearnPoint, ...]

    def rows(self) -> list[dict[str, float]]:
        """Rows for `gradsurgery.evaluation.table`."""
        return [{"step": p.step, "forget": p.forget, "retain": p.retain} for p in self.curve]

    def __str__(self) -> str:
        end = self.curve[-1]
        found = f"back at {self.level:.3f} after {self.steps} steps" if self.steps is not None else "not back"
        return f"{found}; forget loss {self.curve[0].forget:.3f} -> {end.forget:.3f} in {end.step} steps"


def relearn(
    model: nn.Module,
    method: Method | None,
    forget: Text,
    retain: Text,
    level: float,
    held_back: tuple[Text, Text] | None = None,
    steps: int = 100,
    every: int = 5,
    batch_size: int = 16,
    lr: float = 1e-4,
    optimizer: MakeOptimizer | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    seed: int = 0,
    restore: bool = True,
) -> Relearned:
    """Finetune a cut model on equal amounts of forget and retain data until the forget loss is back.

    Args:
        model: A causal language model from which something was removed.
        method: How it is finetuned; ``None`` trains the next token. Batches have the columns ``forget`` and ``retain``.
        forget: Token ids ``[sequences, length]`` of what was removed; entries below 0 are not counted. Or ``(ids,
            labels)``: tokens whose label is below 0, such as those of a prompt, are left out of the loss.
        retain: The same of what was kept.
        level: Forget loss in nats per token that counts as back, such as that before the cut.
        held_back: ``(forget, retain)`` to measure on, each as above; by default what it is finetuned on.
        steps: At most so many.
        every: Measure every so many steps.
        batch_size: Sequences a step, half of them of each kind.
        lr: Of AdamW without decay, where no optimizer is given.
        optimizer: Makes one for a list of parameters.
        parameters: What trains; by default all that requires gradients.
        seed: Of the order of sequences, and of dropout.
        restore: Put weights, buffers and gradients back afterwards, also after an exception.

    Raises:
        DataError: an odd batch size, nothing to train on, or numbers out of range.

    Example:
        >>> from gradsurgery.evaluation import relearn
        >>> ids = batch["input_ids"]
        >>> relearn(model, None, ids[:1], ids[1:], level=3.0, steps=40, batch_size=2, lr=0.05).steps
        5
    """
    base = unwrap(model)
    texts = _pairs(forget, retain)
    _check(texts, level, steps, every, batch_size)
    probe = dict(zip(("forget", "retain"), _pairs(*held_back) if held_back else texts, strict=True))
    trained = [p for p in base.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if not trained:
        raise DataError("relearn: no parameter of the model requires gradients; unfreeze it, or name parameters=….")
    made = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0) if optimizer is None else optimizer(trained)
    device = trained[0].device
    curve: list[RelearnPoint] = []

    def measure(step: int) -> bool:
        found = token_losses(model, {kind: ids for kind, (ids, _) in probe.items()}, batch_size)
        means = {kind: _learned(found[kind], *text) for kind, text in probe.items()}
        curve.append(RelearnPoint(step, means["forget"], means["retain"]))
        return curve[-1].forget <= level

    with _as_before(base, restore), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        back = measure(0)
        base.train()
        with _stepper(method, model, made) as backward:
            for step, batch in zip(range(1, steps + 1), _batches(texts, batch_size // 2, seed, device), strict=False):
                if back:
                    break
                backward(batch)
                made.step()
                made.zero_grad()
                if step % every == 0 or step == steps:
                    back = measure(step)
    return Relearned(curve[-1].step if back else None, level, tuple(curve))


Pair = tuple[Tensor, Tensor]


def _pairs(*given: Text) -> tuple[Pair, Pair]:
    """Ids and labels of forget and retain; labels are the ids where none are given."""
    forget, retain = ((one, one) if not isinstance(one, tuple) else one for one in given)
    return forget, retain


def _learned(losses: Tensor, ids: Tensor, labels: Tensor) -> float:
    """Mean loss of the tokens that have a label, of those of all tokens."""
    counted = labels[:, 1:][ids[:, 1:] >= 0] >= 0
    return float(losses[counted.cpu()].double().mean())


def _check(texts: tuple[Pair, Pair], level: float, steps: int, every: int, batch_size: int) -> None:
    for name, pair in zip(("forget", "retain"), texts, strict=True):
        wrong = any(not isinstance(x, Tensor) or x.ndim != 2 or x.is_floating_point() for x in pair)
        if wrong or pair[0].shape != pair[1].shape or not ((pair[0] >= 0) & (pair[1] >= 0))[:, 1:].any():
            raise DataError(
                f"relearn: {name} holds nothing to learn: expected token ids [sequences, length >= 2], or (ids, "
                f"labels) of one shape."
            )
    forget, retain = (ids for ids, _ in texts)
    if forget.shape[1] != retain.shape[1]:
        raise DataError(
            f"relearn: forget has {forget.shape[1]} tokens a sequence, retain {retain.shape[1]}; pad the shorter "
            f"with -1."
        )
    if not math.isfinite(level):
        raise DataError(f"relearn: level is a loss in nats, not {level!r}.")
    if batch_size < 2 or batch_size % 2:
        raise DataError(f"relearn: batch_size={batch_size} cannot be half forget and half retain; give an even number.")
    if steps < 1 or every < 1:
        raise DataError(f"relearn: steps and every are positive numbers, not {steps!r} and {every!r}.")


def _batches(texts: tuple[Pair, Pair], half: int, seed: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Endlessly: as many sequences of each kind, every one once before one comes again."""
    order = [_cycled(len(ids), half, seed + k) for k, (ids, _) in enumerate(texts)]
    kind = torch.arange(2 * half, device=device) < half
    while True:
        rows = [next(each) for each in order]
        ids, labels = (
            torch.cat([pair[k][chosen] for pair, chosen in zip(texts, rows, strict=True)]).to(device).long()
            for k in range(2)
        )
        real = ids >= 0
        labels = labels.masked_fill(~real | (labels < 0), -100)
        batch = {"input_ids": ids.clamp(min=0), "labels": labels, "forget": kind, "retain": ~kind}
        yield batch if bool(real.all()) else {**batch, "attention_mask": real.long()}


def _cycled(count: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


@contextmanager
def _stepper(method: Method | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """The backward of a batch."""
    from gradsurgery.surgery import Method, Pass, attach  # a floor above: only here, where something is trained

    with attach(method or Method([Pass("relearn")]), model, optimizer) as surgery:
        yield surgery.backward


@contextmanager
def _as_before(base: nn.Module, restore: bool) -> Iterator[None]:
    modes = {module: module.training for module in base.modules()}
    grads = {p: p.grad for p in base.parameters()}
    values = [*base.parameters(), *base.buffers()] if restore else []
    kept = [value.detach().clone() for value in values]
    for p in grads:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for value, before in zip(values, kept, strict=True):
                if not torch.equal(value, before):
                    value.copy_(before)
        for p, grad in grads.items():
            p.grad = grad if restore else None
        for module, training in modes.items():
            module.training = training
