"""Structured pruning: a model that is really smaller, with a config that says so.

The counterpart of ``ablate_``: the same function (up to rounding), fewer weights (cf. Michel et al. 2019,
arXiv 1905.10650, for heads).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.discovery.inputs import dummy_inputs
from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace, require_same_space, require_unpacked, unwrap
from gradsurgery.anatomy.units import Units, require_units
from gradsurgery.errors import AnatomyError, PlanError
from gradsurgery.tensors import fill_, gather, is_sharded, put_
from gradsurgery.transforms.engine.program import box_columns
from gradsurgery.transforms.graft import Graft
from gradsurgery.transforms.resize import built, changed, shapes_of, solutions

_WAY_OUT = "gs.ablate_(model, units) removes them without changing shapes."
_DERIVED = "the class derives these sizes from others (a head size from the hidden size, say)"


@torch.no_grad()
def prune_(model: nn.Module, units: Units, inputs: Mapping[str, Any] | None = None) -> None:
    """Cut ``units`` out of ``model``, in place: smaller tensors, and a config by which plain ``AutoModel`` loads them.

    All or nothing: the config is found by building the class on ``meta``, and the pruned model must give the outputs of
    the ablated one before anything stays. Modules, dtypes, devices, ties, buffers, ``requires_grad`` and training mode
    are kept; parameters that shrink are new objects, so optimizers are to be made anew, and the anatomy too.

    Args:
        model: A Hugging Face model, not sharded.
        units: Closed units of its anatomy, equally many of every layer that one config attribute describes.
        inputs: Keyword arguments of a small forward for the check; random ones if not given.

    Raises:
        SelectionError: a plain region, no units, or units of another model.
        PlanError: the config cannot express it: uneven removal, sizes that the class derives from others, units that
            are not closed, quantised weights. The model is as it was.

    Example:
        >>> gs.prune_(model, anatomy.neurons[:, -16:])
        >>> model.config.intermediate_size  # of 32
        16
    """
    units = require_units(units, "prune_")
    model = unwrap(model)
    space = ParameterSpace.of(model)
    require_same_space(units.space, space, f"prune_: {units.text or 'the selection'}")
    _check_prunable(model, units)
    require_unpacked(space, units.entries, "prune_")
    removed = Region(space, Units(units.anatomy, units.chosen).entries)
    kept = {name: ~part for name, part in removed.entries.items()}
    target = _target(model, space, kept)
    reference = built(model, changed(model.config, ()), buffers=True)
    if shapes_of(reference) != shapes_of(model):
        raise PlanError(f"{space.model} is not what its config describes, so no config describes it pruned. {_WAY_OUT}")
    fed = _inputs(model) if inputs is None else inputs
    wanted = _outputs_without(model, units, fed)
    said, refusals = "", list[str]()
    for config in solutions(model, target, _counts(units), _widths(units), refusals):
        graft = Graft(model, reference, built(model, config, buffers=True))
        try:
            if said := graft.obstacle():
                continue
            graft.apply(lambda name, p: _cut(p, kept[space.canonical(name)]), {n: target[n] for n in kept}, space)
            if not (said := _difference(_outputs(model, fed), wanted, model)):
                return
        except BaseException as error:
            graft.undo()
            if not isinstance(error, RuntimeError | ValueError | IndexError):
                raise
            said = f"its forward fails: {error}"
        else:
            graft.undo()
    why = said or _uneven(units) or " / ".join(dict.fromkeys(r.rstrip(".!") for r in refusals[:2])) or _DERIVED
    raise PlanError(f"no config of {space.model} describes it without {units.text or 'these units'}: {why}. {_WAY_OUT}")


def _check_prunable(model: nn.Module, units: Units) -> None:
    for group, _ in units.groups:
        parent = units.anatomy.parent_of(group) if group.parent is not None else None
        if not group.closed or (parent is not None and not parent.closed):
            raise PlanError(
                f"prune_: the {group.kind}s of {group.name} are coupled (by a full-width norm or a router), so the "
                f"others would change without them. {_WAY_OUT}"
            )
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise PlanError(
            f"prune_ needs a Hugging Face model with a config, and {type(model).__name__} has none. {_WAY_OUT}"
        )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise PlanError(f"prune_: {name} is sharded; prune before fully_shard, or: {_WAY_OUT}")
        if parameter.is_meta:
            raise PlanError(f"prune_: {name} has no storage (meta device); load the weights first.")


def _kept_shape(kept: Entries) -> tuple[int, ...] | None:
    """Shape of what is kept; None where indices of the first dimension lose unequally."""
    boxes = [[bits.bit_count() for bits in box] for box in kept.boxes()]
    if not boxes or any(box[1:] != boxes[0][1:] for box in boxes):
        return None
    return sum(box[0] for box in boxes), *boxes[0][1:]


def _target(model: nn.Module, space: ParameterSpace, kept: dict[str, Entries]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter (under every name) after pruning."""
    target = shapes_of(model)
    for name in target:
        if (entries := kept.get(space.canonical(name))) is not None:
            shape = _kept_shape(entries)
            if shape is None:
                lost = "would be empty" if not entries else "loses unequally many entries from part to part"
                raise PlanError(
                    f"prune_: {name} {lost}. Remove equally many units of every expert and layer, or: {_WAY_OUT}"
                )
            target[name] = shape
    return target


def _cut(parameter: Tensor, kept: Entries) -> Tensor:
    boxes = kept.boxes()
    if len(boxes) == 1:
        return gather(parameter, [box_columns(boxes[0], kept.shape)])[0]
    shape = _kept_shape(kept)
    assert shape is not None
    return parameter[kept.mask().to(parameter.device)].reshape(shape)


def _counts(units: Units) -> list[tuple[int, int]]:
    """``(before, after)`` of the chosen groups, and of the KV groups that go with them."""
    out = []
    for group, chosen in units.groups:
        out.append((len(group), len(group) - len(chosen)))
        if group.parent is not None:
            parent, complete = units.anatomy.complete_parents(group, chosen)
            out.append((len(parent), len(parent) - len(complete)))
    return [(before, after) for before, after in dict.fromkeys(out) if before != after]


def _widths(units: Units) -> list[int]:
    return [
        rows.shape[1]
        for group, _ in units.groups
        for k in group.consumer_slots
        for rows in group.footprints[k].index.values()
    ]


def _uneven(units: Units) -> str:
    """Which like groups lose unequally many units, in words; empty if none."""
    losses: dict[tuple[str, int], dict[int, str]] = {}
    for g, group in enumerate(units.anatomy.groups):
        lost = units.chosen.get(g, 0).bit_count()
        losses.setdefault((group.kind, len(group)), {}).setdefault(lost, group.name)
    for g in units.chosen:
        group = units.anatomy.groups[g]
        if len(found := losses[group.kind, len(group)]) > 1:
            each = ", ".join(f"{name} {n}" for n, name in found.items())
            return f"it holds for all layers alike, and they lose unequally many {group.kind}s ({each})"
    return ""


def _inputs(model: nn.Module) -> Mapping[str, Any]:
    try:
        made = dummy_inputs(model)
    except AnatomyError as error:
        raise PlanError(f"prune_ cannot check its work: {error} Pass inputs=… of a small forward.") from None
    first = next(model.parameters())
    return {
        name: value.to(first.device, first.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in made.items()
    }


def _outputs(model: nn.Module, fed: Mapping[str, Any]) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            out = model(**fed)
    finally:
        for module, mode in modes:
            module.training = mode
    values = out.values() if isinstance(out, Mapping) else [out] if isinstance(out, Tensor) else out
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _outputs_without(model: nn.Module, units: Units, fed: Mapping[str, Any]) -> list[Tensor]:
    """The outputs of the ablated model; the weights are put back."""
    parameters = dict(model.named_parameters())
    boxes = {n: [box_columns(box, part.shape) for box in part.boxes()] for n, part in units.consumers.entries.items()}
    saved = {name: gather(parameters[name], found) for name, found in boxes.items()}
    try:
        for name, found in boxes.items():
            fill_(parameters[name], found, 0.0)
        return _outputs(model, fed)
    finally:
        for name, found in boxes.items():
            put_(parameters[name], found, saved[name])


def _difference(found: list[Tensor], wanted: list[Tensor], model: nn.Module) -> str:
    """Empty if the outputs agree to the rounding of the model's dtype."""
    tolerance = max(1e-6, 30 * torch.finfo(next(model.parameters()).dtype).eps)
    for new, old in zip(found, wanted, strict=True):
        if new.shape != old.shape:
            return f"outputs change from {list(old.shape)} to {list(new.shape)}"
        gap = float((new.double() - old.double()).abs().max() / old.double().abs().max().clamp_min(1e-30))
        if not gap <= tolerance:
            return f"the pruned model would not compute what the ablated one does (outputs differ by {gap:.0e})"
    return ""
