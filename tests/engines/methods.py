"""Every method of the library on tiny double models: what the tests of engines and hosts run through.

In a double model rounding stays rounding, so that engines can be compared to twelve digits. Batches are the ugly ones:
padded rows, a first half without any label in the first step, and of forget rows alone in the last.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.adapters import Score
from gradsurgery.estimators import Basis, Importance
from tests.adapters.tiny import stir
from tests.keys.tiers import double, key_of, keys_of
from tests.surgery.tiny import anatomy, batch, forget_of, sgtm

ROWS, STEPS = 8, 3
Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A method with small settings.

    Attributes:
        make: From a fresh model to what is trained (the model, or the model with its adapter) and the method.
        kind: Architecture.
        quick: Whether it stands for its family where all would take too long.
    """

    make: Callable[[Any], tuple[nn.Module, gs.Method]]
    kind: str = "llama"
    quick: bool = False

    def start(self, dtype: torch.dtype = torch.float64) -> tuple[Any, gs.Method]:
        """A fresh host and its method; the same numbers each time."""
        return self.make(double(self.kind).to(dtype))


def on_model(make: Callable[[Any], gs.Method], kind: str = "llama", quick: bool = False) -> Case:
    return Case(lambda model: (model, make(model)), kind, quick)


def on_adapter(make: Callable[[Any], gs.Method], quick: bool = False, **options: Any) -> Case:
    def start(model: Any) -> tuple[nn.Module, gs.Method]:
        adapter = adapted(model, **options)
        return adapter.host, make(adapter)

    return Case(start, quick=quick)


def adapted(model: Any, **options: Any) -> Any:
    """An adapter that does something."""
    return stir(gs.adapters.add(model, "all-linear", **{"rank": 4, **options}))


def reference(kind: str = "llama") -> gs.losses.Frozen:
    """Another model, so that no divergence vanishes."""
    return gs.losses.frozen(double(kind, seed=1))


@functools.cache
def basis(side: Any = "input") -> Basis:
    return gs.estimators.activation_basis(double("llama"), [batch(seed=50)], "mlp", side=side)


@functools.cache
def importance(rotated: bool) -> Importance:
    found = basis() if rotated else gs.estimators.identity_basis(double("llama"), "mlp")
    return gs.estimators.importance(double("llama"), found, [batch(seed=51)])


@functools.cache
def memory() -> Any:
    return gs.estimators.gradient_memory(double("llama"), [batch(4, seed=52)], count=2)


def direction(adapter: Any) -> Any:
    pairs = [(batch(3, seed=53), batch(3, seed=54))]
    return gs.estimators.paired_direction(adapter.model, adapter, pairs, noise="keep")


def score(adapter: Any) -> Score:
    """A fixed threshold: those that follow the data do so batch by batch, whatever is accumulated."""
    return Score(direction(adapter), 0.0)


def clipped(method: gs.Method, norm: float = 0.5) -> gs.Method:
    return gs.Method(method.passes, [*method.gradient, gs.clip(norm)], method.update)


m = gs.methods
TASKS: dict[str, Any] = {"forget": "forget", "retain": "retain", "others": {"rows": "~forget", "weight": 0.5}}
TRAINED = "model.layers.*.mlp.down_proj.weight"

CASES: dict[str, Case] = {
    "plain": on_model(lambda model: m.plain()),
    "data_filter": on_model(lambda model: m.data_filter()),
    "sgtm, mask": on_model(lambda model: sgtm("llama", "mask"), quick=True),
    "sgtm, mask, projections joint": on_model(
        lambda model: m.sgtm(anatomy("gpt_neo"), forget_of("gpt_neo"), joint=["mlp_projection"]), "gpt_neo"
    ),
    "sgtm, detach": on_model(lambda model: sgtm("gpt_neo", "detach"), "gpt_neo"),
    "sgtm, zero": on_model(lambda model: sgtm("gpt_neo", "zero"), "gpt_neo", quick=True),
    "tiered": on_model(lambda model: clipped(m.tiered(key_of("llama"), anatomy())), quick=True),
    "tiered, in C2": on_model(lambda model: m.tiered(key_of("gpt_neo"), anatomy("gpt_neo"), step_in="C2"), "gpt_neo"),
    "tiered, every 2": on_model(lambda model: m.tiered(key_of("llama"), anatomy(), every=2)),
    "tiered, sampled": on_model(lambda model: m.tiered(keys_of("llama", 2), anatomy(), tiers="sampled", seed=3)),
    "private_finetune": on_model(
        lambda model: m.private_finetune(key_of("llama"), anatomy(), 0.3, decoys=2, l2=0.1), quick=True
    ),
    "quarantine, route by label": on_adapter(lambda a: m.quarantine(a, where="forget"), quick=True),
    "quarantine, absorb by label": on_adapter(lambda a: m.quarantine(a, "absorb", "forget", clean="retain")),
    "quarantine, route by score": on_adapter(lambda a: m.quarantine(a, where=None, score=score(a)), quick=True),
    "quarantine, absorb by score": on_adapter(lambda a: m.quarantine(a, "absorb", None, score(a))),
    "quarantine, gains": on_adapter(lambda a: m.quarantine(a, where="forget"), kind="svd", rank=8, quarantine_rank=4),
    "quarantine, erase": on_adapter(lambda a: m.quarantine(a, "erase", direction=direction(a)), quick=True),
    "warp": on_model(lambda model: m.warp(basis(), importance(True), gradient=True), quick=True),
    "gpm": on_model(lambda model: clipped(m.gpm(basis(), energy=0.9))),
    "actsvd": on_model(lambda model: m.actsvd(basis("output"), k=4)),
    "original_space_mask": on_model(lambda model: m.original_space_mask(importance(False), others="freeze")),
    "mixed": on_model(lambda model: m.mixed(0.25)),
    "opposed": on_model(lambda model: clipped(m.opposed(reference(), "both", metrics="global")), quick=True),
    "opposed, labelled rows": on_model(lambda model: m.opposed(reference(), "conflict", "tensor", rows="forget")),
    "opposed, update": on_model(lambda model: m.opposed(reference(), "both", at="update")),
    "safegrad": on_model(lambda model: m.safegrad(reference(), scope="module", alignment_weight=0.2)),
    "ogpsa": on_model(lambda model: m.ogpsa(every=2, references=["general", "code"])),
    "gru": on_model(
        lambda model: m.gru(0.5, forget_loss=gs.losses.npo(), reference=reference(), retain_weight=0.5), quick=True
    ),
    "ogd": on_model(lambda model: m.ogd(memory(), at="update")),
    "pcgrad": on_model(lambda model: m.pcgrad(TASKS, seed=1)),
    "gradient_ascent": on_model(lambda model: clipped(m.gradient_ascent(0.5))),
    "npo": on_model(lambda model: m.npo(reference(), retain_loss=gs.losses.kl_divergence)),
    "rmu": on_model(lambda model: m.rmu("model.layers.1", gs.region(model, TRAINED), retain_weight=5.0)),
}


QUICK = [name for name, case in CASES.items() if case.quick]


def public_methods() -> set[str]:
    """Names in ``gs.methods`` whose functions return a method."""
    return {name for name in m.__all__ if inspect.signature(getattr(m, name)).return_annotation == "Method"}


def batches(method: gs.Method, rows: int = ROWS) -> list[Batch]:
    """A batch a step, with the sub-batches that the method reads."""
    out: list[Batch] = [batch(rows, seed=k) for k in range(STEPS)]
    for name in ("forget", "retain"):
        out[0][name][: rows // 2] = False
    out[2]["forget"][: rows // 2], out[2]["retain"][: rows // 2] = True, False
    streams = sorted({p.stream for p in method.passes if p.stream})
    for k, data in enumerate(out):
        data.update({stream: batch(rows, seed=100 + 10 * k + j) for j, stream in enumerate(streams)})
    return out


def share(whole: Any, part: int, parts: int) -> Any:
    """One of several equal parts of the rows of a batch and of its sub-batches."""
    if isinstance(whole, Tensor):
        each = len(whole) // parts
        return whole[part * each : (part + 1) * each]
    return {name: share(value, part, parts) for name, value in whole.items()}


def optimizer_of(host: nn.Module, **more: Any) -> torch.optim.AdamW:
    trained = [p for p in host.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, **{"lr": 1e-2, "weight_decay": 0.1, **more})


def fresh(method: gs.Method) -> gs.Method:
    """The same method with references and states of its own."""
    return copy.deepcopy(method)
