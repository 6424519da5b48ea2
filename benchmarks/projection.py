"""One gradient kept clear of another: cross-entropy and KL to a frozen reference, against stock forward and backward.

GPT-Neo, 8 layers, width 384, vocabulary 8,192, 4 x 256 tokens; no optimizer's step in any of them.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gradsurgery as gs
from benchmarks import steps

Run = Callable[[], None]
Make = Callable[[str], Run]


def setup(device: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """The model, a reference that it has left a little, and a batch."""
    model, _, ids = steps.build(device)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model, reference, {"input_ids": ids, "labels": ids}


def stock(device: str) -> Run:
    model, _, batch = setup(device)

    def run() -> None:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad()

    return run


def surgical(device: str, cache: bool = False, top_k: int | None = None, **options: Any) -> Run:
    """Ours: one student forward, two losses, the reference's forward or what is stored of it, the projection."""
    model, reference, batch = setup(device)
    given: Any = gs.losses.frozen(reference)
    if cache:
        folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        given = gs.losses.precompute(f"{folder.name}/reference", reference, [batch], top_k=top_k)
        del reference
    surgery = gs.attach(gs.methods.opposed(given, **options), model)
    if cache:
        weakref.finalize(surgery, folder.cleanup)

    def run() -> None:
        surgery.backward(batch)
        surgery.finish()
        model.zero_grad()

    return run


def by_hand(device: str) -> Run:
    """What a careful user writes: two backwards over one forward, one gradient set aside, no second copy."""
    model, reference, batch = setup(device)
    labels = batch["labels"]

    def run() -> None:
        with torch.no_grad():
            target = reference(input_ids=batch["input_ids"], use_cache=False).logits
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        ce, kl = losses(logits, target, labels)
        ce.backward(retain_graph=True)
        kept = [p.grad for p in model.parameters()]
        for p in model.parameters():
            p.grad = None
        kl.backward()
        project_(kept, [p.grad for p in model.parameters()])
        for p, g in zip(model.parameters(), kept, strict=True):
            p.grad = g
        model.zero_grad()

    return run


def script(device: str) -> Run:
    """The original script's step: the model runs once for each loss, and both gradients are copied."""
    model, reference, batch = setup(device)

    def copied() -> list[Any]:
        out = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return out

    def run() -> None:
        model(**batch, use_cache=False).loss.backward()
        kept = copied()
        with torch.no_grad():
            target = reference(input_ids=batch["input_ids"], use_cache=False).logits
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        divergence(logits, target).backward()
        project_(kept, copied())
        for p, g in zip(model.parameters(), kept, strict=True):
            p.grad = g
        model.zero_grad()

    return run


def project_(kept: list[Any], others: list[Any]) -> None:
    """``kept -= <kept, others> / <others, others> others``, summed tensor by tensor."""
    both = sum((g * r).sum() for g, r in zip(kept, others, strict=True))
    squares = sum((r * r).sum() for r in others)
    torch._foreach_add_(kept, others, alpha=-(both / squares).item())


def losses(logits: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    words = logits.shape[-1]
    ce = F.cross_entropy(logits[:, :-1].reshape(-1, words), labels[:, 1:].reshape(-1))
    return ce, divergence(logits, target)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    words = logits.shape[-1]
    student, teacher = F.log_softmax(logits, -1).view(-1, words), F.log_softmax(target, -1).view(-1, words)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def torchjd(device: str, name: str) -> Run:
    """The same two losses through TorchJD's jacobian and one of its aggregators."""
    from torchjd import aggregation, autojac

    model, reference, batch = setup(device)
    aggregator = getattr(aggregation, name)()
    parameters = list(model.parameters())

    def run() -> None:
        with torch.no_grad():
            target = reference(input_ids=batch["input_ids"], use_cache=False).logits
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        autojac.backward(list(losses(logits, target, batch["labels"])))
        autojac.jac_to_grad(parameters, aggregator)
        model.zero_grad()

    return run


METHODS: dict[str, Make] = {
    "stock against itself": stock,
    "opposed": surgical,
    "opposed, cached log-probabilities": partial(surgical, cache=True),
    "opposed, cached top 64": partial(surgical, cache=True, top_k=64),
    "opposed, conflict only, metrics": partial(surgical, remove="conflict", metrics="global"),
    "opposed, by row": partial(surgical, scope="row"),
    "two backwards by hand": by_hand,
    "two forwards and two copies, as the script": script,
    "TorchJD PCGrad": partial(torchjd, name="PCGrad"),
    "TorchJD UPGrad": partial(torchjd, name="UPGrad"),
}


def gradient_bytes() -> int:
    """What one gradient of the model takes."""
    model, _, _ = steps.build("cpu")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def available() -> dict[str, Make]:
    """The candidates that can run here: TorchJD is an extra, some of its aggregators need more."""
    out = {}
    for name, make in METHODS.items():
        if name.startswith("TorchJD"):
            if importlib.util.find_spec("torchjd") is None:
                continue
            try:
                make("cpu")
            except ImportError:
                continue
        out[name] = make
    return out


def step(device: str, make: Make) -> Run:
    """One run of a candidate, on a model of its own."""
    return make(device)
