"""Methods by hand: gradients as one flat fp64 vector, and the papers' algorithms on it.

The oracle runs a stock model on the very micro-batches that the surgery gets, and differentiates it by torch alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

TOKENS, WORDS = 6, 23

# of these three nothing is computed in fp32 in a double model: rounding stays rounding, over several steps
KINDS: dict[str, dict[str, Any]] = {
    "stablelm": {  # grouped queries, gates, rotary positions, an output head of its own
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "opt": {  # tied head, learned positions, biases
        "hidden_size": 12,
        "word_embed_proj_dim": 12,
        "ffn_dim": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 16,
        "dropout": 0.0,
    },
    "gpt2": {  # Conv1D, fused queries, keys and values
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 16,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
Batch = dict[str, Any]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, int]]
"""Mean loss of a batch, and how many items it is a mean over."""


def build(kind: str, frozen: str = "none", seed: int = 0) -> Any:
    """A tiny double model; ``frozen`` names what does not train."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.CONFIG_MAPPING[kind](vocab_size=WORDS, bos_token_id=1, eos_token_id=2, **KINDS[kind])
        model = transformers.AutoModelForCausalLM.from_config(config).double().train()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    table = model.get_input_embeddings().weight
    for k, parameter in enumerate(model.parameters()):
        if (frozen == "embeddings" and parameter is table) or (frozen == "every third" and k % 3 == 1):
            parameter.requires_grad_(False)
    return model


def batch(rows: int, seed: int) -> Batch:
    """Padded rows, and bool columns by which they are sorted."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, TOKENS), generator=g)
    lengths = torch.randint(2, TOKENS + 1, (rows,), generator=g)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    forget = torch.rand(rows, generator=g) < 0.5
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "forget": forget,
        "retain": ~forget & (torch.rand(rows, generator=g) < 0.8),
    }


def rows_of(given: Batch, column: str) -> Batch | None:
    """The rows that a column flags (``~column``: the others); None where there are none."""
    flags = given[column.removeprefix("~")]
    flags = ~flags if column.startswith("~") else flags
    return {k: v[flags] for k, v in given.items() if isinstance(v, Tensor)} if flags.any() else None


def logits(model: nn.Module, given: Batch) -> Tensor:
    return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits


def ce(model: nn.Module, given: Batch) -> tuple[Tensor, int]:
    targets = given["labels"][:, 1:]
    found = F.cross_entropy(logits(model, given)[:, :-1].transpose(1, 2), targets, ignore_index=-100)
    return found, int((targets != -100).sum())


def kl_to(reference: nn.Module, padding: bool = False) -> Loss:
    """Mean KL(reference ‖ model) over attended positions, or all."""

    def loss(model: nn.Module, given: Batch) -> tuple[Tensor, int]:
        with torch.no_grad():
            teacher = logits(reference, given).softmax(-1)
        each = F.kl_div(logits(model, given).log_softmax(-1), teacher, reduction="none").sum(-1)
        counted = torch.ones_like(given["attention_mask"]) if padding else given["attention_mask"]
        return (each * counted).sum() / counted.sum(), int(counted.sum())

    return loss


def npo_to(reference: nn.Module, beta: float) -> Loss:
    def loss(model: nn.Module, given: Batch) -> tuple[Tensor, int]:
        def log_prob(one: nn.Module) -> Tensor:
            targets = given["labels"][:, 1:]
            log_probs = logits(one, given)[:, :-1].log_softmax(-1)
            picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            return (picked * (targets != -100)).sum(-1)

        with torch.no_grad():
            theirs = log_prob(reference)
        ratio = log_prob(model) - theirs
        return 2 / beta * torch.log1p((beta * ratio).exp()).mean(), len(ratio)

    return loss


class Hand:
    """A model that is trained by hand.

    Attributes:
        names: Parameters that train, in the order of the flat vector.
        memory: What a method remembers from step to step.
        step: Steps done.
    """

    def __init__(self, model: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.model = copy.deepcopy(model)
        self.before = copy.deepcopy(model)
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer(self.parameters)
        self.memory: dict[str, Any] = {}
        self.step = 0

    def grad(self, loss: Loss, batches: Sequence[Batch | None]) -> Tensor:
        """The gradient of the mean over all items of the micro-batches."""
        given = [b for b in batches if b is not None]
        total = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64)
        found = []
        for one in given:
            value, items = loss(self.model, one)
            grads = torch.autograd.grad(value, self.parameters, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, grads, strict=True)]
            found.append((torch.cat([part.reshape(-1) for part in parts]), items))
        items = sum(n for _, n in found)
        for grad, n in found:
            total += grad * (n / items)
        return total

    def blocks(self, scope: str) -> Iterator[Tensor]:
        """Indices into the flat vector that are projected together."""
        groups: dict[Any, list[Tensor]] = {}
        start = 0
        for name, p in zip(self.names, self.parameters, strict=True):
            index = torch.arange(start, start + p.numel())
            start += p.numel()
            if scope == "row" and p.dim() > 1:  # a vector is one block
                for k, row in enumerate(index.view(p.shape[0], -1)):
                    groups[name, k] = [row]
                continue
            key = {"global": "", "module": name.rpartition(".")[0], "tensor": name, "row": name}[scope]
            groups.setdefault(key, []).append(index)
        for parts in groups.values():
            yield torch.cat(parts)

    def apply(self, grad: Tensor) -> None:
        """One step of the optimizer along a flat gradient."""
        for p, part in zip(self.parameters, grad.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = part.view(p.shape).clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])


def clear_of(
    hand: Hand,
    g: Tensor,
    vectors: Sequence[Tensor],
    remove: str = "both",
    scope: str = "global",
    keep: float = 1.0,
    weight: float = 1.0,
    max_cosine: float = 1.0,
    floor: float = 0.0,
) -> Tensor:
    """``keep * g - weight * (what is removed)``, block by block."""
    out = keep * g
    for block in hand.blocks(scope):
        mine, others = g[block], [v[block] for v in vectors]
        others = [v for v in others if v.norm() > floor * mine.norm()]
        if not others or not mine.norm():
            continue
        removed = mine - nearest(mine, others, remove)
        if len(others) == 1 and max_cosine < 1 and removed.norm():
            removed = removed * min(1.0, max_cosine * mine.norm() / removed.norm())
        out[block] -= weight * removed
    return out


def move_clear_of(hand: Hand, grad: Tensor, vectors: Sequence[Tensor], remove: str, **options: Any) -> None:
    """One step along ``grad``, of which only what is clear of the vectors is kept.

    An update conflicts where it goes uphill, along the vector; a gradient, where it points the other way.
    """
    before = hand.flat()
    hand.apply(grad)
    turned = {"conflict": "agreement", "agreement": "conflict", "both": "both"}[remove]
    after = before + clear_of(hand, hand.flat() - before, vectors, turned, **options)
    with torch.no_grad():
        for p, part in zip(hand.parameters, after.split([p.numel() for p in hand.parameters]), strict=True):
            p.copy_(part.view(p.shape))


def nearest(g: Tensor, vectors: Sequence[Tensor], remove: str) -> Tensor:
    """The nearest vector to ``g`` that is orthogonal to all, or on the allowed side of each: by trying every subset."""

    def off(chosen: Sequence[Tensor]) -> Tensor:
        if not chosen:
            return g
        v = torch.stack(list(chosen))
        return g - v.T @ torch.linalg.lstsq(v @ v.T, v @ g, driver="gelsd").solution

    if remove == "both":
        return off(vectors)
    sign = 1 if remove == "conflict" else -1
    found = []
    for size in range(len(vectors) + 1):
        for chosen in itertools.combinations(range(len(vectors)), size):
            candidate = off([vectors[k] for k in chosen])
            rest = [sign * (candidate @ v) / (v.norm() * g.norm()) for k, v in enumerate(vectors) if k not in chosen]
            if all(r >= 0 for r in rest):
                found.append(candidate)
    return min(found, key=lambda candidate: float((candidate - g).norm()))
