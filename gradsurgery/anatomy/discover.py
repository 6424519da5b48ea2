"""Find the units of any model: gradient coupling proposes, swap tests decide. No table of names.

    d activation[column] / d parameter != 0   <=>   the entry writes the column

Entries and columns that are coupled to each other and to nothing else form a unit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import AnatomyError
from .discovery.blocks import Survey, survey
from .discovery.declared import Declared, declare
from .discovery.draft import Draft
from .discovery.emit import groups_from
from .discovery.experts import Unreached, expert_drafts
from .discovery.forward import forward
from .discovery.inputs import dummy_inputs, widen_inputs
from .discovery.memory import fresh, hollow, key_of, key_of_twins, recall
from .discovery.partition import Inner
from .discovery.replica import learned, replica
from .discovery.scale import Transfer, agree
from .discovery.structure import structural_like, structural_of
from .discovery.tables import tables_of
from .discovery.trace import Trace
from .discovery.twin import configs_of, needs_twin, twin_of
from .discovery.verdict import judged
from .discovery.verify import Judge
from .discovery.wide import Settle, Wide
from .groups import UnitGroup
from .layouts import Layout

log = logging.getLogger("gradsurgery")
BATCHES = (2, 8, 32, 128)
"""Examples of a forward: the first number, or the next ones while they reach more of the weights."""
LARGEST_COPY = 300_000_000
"""Parameters up to which a model without a twin is copied, in float64, and examined itself."""


@dataclass(frozen=True)
class Discovery:
    """Units of a model and what belongs to none.

    Attributes:
        groups: Unit groups in layer order.
        structural: Parameter name -> why it belongs to no unit.
        seconds: Time taken.
    """

    groups: tuple[UnitGroup, ...]
    structural: dict[str, str]
    seconds: float


def discover(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    structural: Sequence[str] = (),
    layouts: Sequence[Layout] = (),
) -> Discovery:
    """Find the attention heads, KV groups, neurons, experts and SSM heads of ``model``, which is not touched.

    Args:
        model: Any module; Hugging Face models need no ``inputs``.
        inputs: Keyword arguments of one forward, for models whose inputs cannot be guessed.
        structural: Parameters or modules that may stay without units though nothing explains them; globs.
        layouts: Declared units, verified like all others; they replace what they overlap.

    Raises:
        AnatomyError: A part of the model is neither units nor known structure, or a declaration fails.
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        groups, why = _examined(model, inputs, structural, layouts)
    if not groups:
        raise AnatomyError(
            f"{type(model).__name__} shows no units: no weights that are written and read by units of their own. "
            "Give inputs=… that reach its layers, or choose whole parameters with gs.region(model, names)."
        )
    return Discovery(groups, why, time.perf_counter() - start)


def _examined(
    model: nn.Module, inputs: Mapping[str, Any] | None, structural: Sequence[str], layouts: Sequence[Layout]
) -> tuple[tuple[UnitGroup, ...], dict[str, str]]:
    if needs_twin(model):
        try:
            return _by_twin(model, structural, layouts)
        except Exception as error:  # whatever a shrunken config leads to; the model itself may still be examined
            if any(p.is_meta for p in model.parameters()) or sum(p.numel() for p in model.parameters()) > LARGEST_COPY:
                raise
            log.info("no tiny twin (%s); examining a copy of the model itself", error)
    return _direct(model, inputs, structural, layouts)


def _direct(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    structural: Sequence[str] = (),
    layouts: Sequence[Layout] = (),
) -> tuple[tuple[UnitGroup, ...], dict[str, str]]:
    _require_length(model, inputs)

    def examined() -> tuple[tuple[UnitGroup, ...], dict[str, str]]:
        copy = replica(model)
        _, seen, found, declared = _probed(copy, inputs, layouts)
        drafts = [*declared.spared(found), *declared.drafts]
        why = structural_of(copy, seen, drafts, structural)
        return groups_from(drafts, copy), why

    groups, why = recall(key_of(model, structural, layouts) if inputs is None else None, examined)
    return fresh(groups), dict(why)


def _require_length(model: nn.Module, inputs: Mapping[str, Any] | None) -> None:
    """Raise where one token was given: it attends to itself only, and queries and keys have no influence."""
    for name, value in (inputs or {}).items():
        if name.endswith("ids") and isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == 1:
            raise AnatomyError(
                f"inputs[{name!r}] is one token long, which leaves the queries and keys of {type(model).__name__} "
                "without influence: give inputs of several tokens."
            )


def _by_twin(
    model: nn.Module, structural: Sequence[str] = (), layouts: Sequence[Layout] = ()
) -> tuple[tuple[UnitGroup, ...], dict[str, str]]:
    """Probe tiny twins, and carry what they show over to the shapes of ``model``.

    A second twin of other sizes checks that the first one's layout scales; where it does not, a third one keeps every
    head.
    """
    configs = configs_of(model)
    twin, drafts, declared, inner, explained = recall(
        key_of_twins(model, configs, structural, layouts), lambda: _shown(model, configs, structural, layouts)
    )
    transfer = Transfer(twin, model, drafts, inner)
    carried = transfer.carried()
    wanted = declared.like(model, transfer.sources)
    real = [*wanted.spared(carried), *wanted.drafts]
    return groups_from(real, model), structural_like(model, explained, transfer.sources, real, transfer.blocks)


def _shown(
    model: nn.Module, configs: Sequence[Any], structural: Sequence[str], layouts: Sequence[Layout]
) -> tuple[nn.Module, list[Draft], Declared, Inner, dict[str, str]]:
    """What tiny twins show: one of them without its values, verified drafts, inner lists, reasons."""
    first, second = (_probed(twin_of(model, config), None, layouts, twin=True) for config in configs[:2])
    source = second if _scales(first, second) else _probed(twin_of(model, configs[2]), None, layouts, twin=True)
    twin, seen, drafts, declared = source
    explained = structural_of(twin, seen, [*drafts, *declared.drafts], structural)
    return hollow(twin), drafts, declared, seen.inner, explained


_Probed = tuple[nn.Module, Survey, list[Draft], Declared]


def _probed(
    copy: nn.Module, inputs: Mapping[str, Any] | None, layouts: Sequence[Layout], twin: bool = False
) -> _Probed:
    """What a replica or a twin shows, without what declarations replace; experts stay, for they count neuron groups.

    Where the tests route too few tokens to some expert, again with more of them. Inputs that were given stay.
    """
    for least in BATCHES[:-1]:
        try:
            return _probed_with(copy, inputs, layouts, twin, least)
        except Unreached:  # noqa: PERF203
            if inputs is not None:
                raise
    return _probed_with(copy, inputs, layouts, twin, BATCHES[-1])


def _probed_with(
    copy: nn.Module, inputs: Mapping[str, Any] | None, layouts: Sequence[Layout], twin: bool, least: int
) -> _Probed:
    seen, fed = traced(copy, inputs, least)
    declared = declare(layouts, copy, lambda: forward(copy, fed, Wide()), twin)
    declared.explain(seen)
    return copy, seen, declared.spared(verified(copy, seen, fed), experts=False), declared


def _scales(small: _Probed, large: _Probed) -> bool:
    """Whether the first twin's findings, carried over, are the second's."""
    try:
        return agree(Transfer(small[0], large[0], small[2], small[1].inner).carried(), large[2])
    except AnatomyError:
        return False


def traced(copy: nn.Module, inputs: Mapping[str, Any] | None, least: int = 2) -> tuple[Survey, dict[str, Any]]:
    """Trace a forward of ``least`` examples and couple every block; more while that reaches more weights (experts)."""
    unread = None
    if any(isinstance(module, _BatchNorm) for module in copy.modules()):
        forward(copy, widen_inputs(inputs) if inputs is not None else dummy_inputs(copy, batch=8), Settle())
    for batch in [size for size in BATCHES if size >= least]:
        fed = widen_inputs(inputs) if inputs is not None else dummy_inputs(copy, batch=batch)
        fresh = Trace(copy)
        fresh_outputs = forward(copy, fed, fresh)
        if unread and fresh.unread() >= unread:
            if fresh.updates.known:  # weights are made in the forward, so this one cut off the trace before it
                trace, outputs, used = fresh, fresh_outputs, fed
            break
        trace, outputs, unread, used = fresh, fresh_outputs, fresh.unread(), fed
        if inputs is not None or (unread == 0 and (batch > 2 or not fresh.stacked())):
            break
    return survey(copy, trace, outputs), used


def verified(copy: nn.Module, seen: Survey, fed: dict[str, Any]) -> list[Draft]:
    """The drafts that survive their swap tests, experts included."""

    def run() -> list[Tensor]:
        return forward(copy, fed, Wide(scatter=True))

    tensors = {name: tensor for name, tensor, _ in learned(copy)}
    buffers = {name for name, _, is_buffer in learned(copy) if is_buffer}
    judge = Judge(run, tensors)
    seen.silent = judge.silent()
    drafts = judged(seen.drafts, judge)
    experts = expert_drafts(drafts, tensors, buffers, judge, tables_of(copy))  # numbers the drafts of their neurons
    return [*drafts, *experts]


__all__ = ["Discovery", "discover"]
