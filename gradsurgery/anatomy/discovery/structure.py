"""Everything that belongs to no unit, and why; what cannot be explained is an error, never a silent skip."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import numpy as np
from torch import nn

from gradsurgery.errors import AnatomyError

from .blocks import Survey
from .draft import Draft
from .names import canonical_of
from .trace import DISGUISED

DECLARED = "declared structural"
CHOOSES = "makes choices only"
UNEVEN = "unequal parts of units"
SHARED = "shared by several heads"
PARTLY = "partly shared by all units"


def is_declared(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern names a parameter: itself, a module above it, or a glob."""
    return any(name == p or name.startswith(f"{p}.") or fnmatch.fnmatchcase(name, p) for p in patterns)


def structural_of(model: nn.Module, seen: Survey, drafts: list[Draft], declared: Sequence[str] = ()) -> dict[str, str]:
    """Parameter name -> reason, for every parameter without units.

    ``declared``: parameters that may be left without units though nothing explains them.

    Raises:
        AnatomyError: A live matrix inside a block is no known kind of structure.
    """
    held = {n for d in drafts for s in d.slots for n in ([s.name] if isinstance(s.name, str) else s.name)}
    riders = {rider for d in drafts for rider in d.riders}
    uneven = {name for d in drafts for name in d.uneven}
    latent = {name: why for found in seen.findings.values() for name, why in found.structural.items()}
    weights = {read.name for node in seen.trace.nodes.values() for read in node.reads}
    with_heads = {d.block for d in drafts if d.kind == "head"}
    claims = {name: mask for f in seen.findings.values() for name, mask in f.claimed.items() if name not in latent}
    claimed = set(claims)
    common = {name: b in with_heads for b, found in seen.findings.items() for name in found.common - latent.keys()}
    claimed |= {name for name, explained in common.items() if not explained}
    shapes = {name: tuple(tensor.shape) for name, tensor in seen.trace.tensors.items()}
    partly = {
        name
        for name, mask in partly_held(shapes, drafts).items()
        if name in claims and _open(name, ~mask & claims[name], seen)
    }
    found, unknown = {}, []
    for name, parameter in model.named_parameters():
        if name in held and name not in partly:
            continue
        lost = name in claimed and name not in riders
        why = None if lost else _reason(name, parameter.ndim, seen, riders, latent, weights)
        if name in seen.silent and name in weights:
            why = CHOOSES
        if name in uneven:
            why = UNEVEN
        if common.get(name) and not lost:
            why = SHARED
        if why is None and is_declared(name, declared):
            why = DECLARED
        if why is None:
            unknown.append(name)
        else:
            found[name] = why
    for name, mask in partly_held(shapes, drafts).items():
        read = [m.numpy() for m in (seen.reach.inside.get(name), seen.reach.leaks.get(name)) if m is not None]
        if name not in partly and any((m & ~mask).any() for m in read) and name in dict(model.named_parameters()):
            found[name] = PARTLY
    if any(seen.trace.tensors[name].ndim > 1 for name in unknown):
        raise AnatomyError(_message(model, unknown))
    found |= {name: "bias" if "bias" in name.rpartition(".")[2] else "norm" for name in unknown}
    for name, why in found.items():
        if why == "bias" and found.get(name.rpartition(".")[0] + ".weight") == "norm":
            found[name] = "norm"
    return found


def structural_like(  # type: ignore[no-untyped-def]
    model, small: dict[str, str], sources: dict[str, str], drafts: list[Draft], blocks: dict[str, str]
) -> dict[str, str]:
    """The twin's reasons under the real model's names.

    Raises:
        AnatomyError: A parameter is in no unit, and its counterpart in the twin is not explained either.
    """
    held = {n for d in drafts for s in d.slots for n in ([s.name] if isinstance(s.name, str) else s.name)}
    alike: dict[str, set[str]] = {}
    for name, why in small.items():
        alike.setdefault(canonical_of(name), set()).add(why)
    found, unknown = {}, []
    for name, parameter in model.named_parameters():
        block = blocks[name]
        twin = sources.get(block, "") + name[len(block) :] if block else name
        if twin in small:
            found[name] = small[twin]
        elif name not in held and parameter.ndim < 2 and len(alike.get(canonical_of(twin), ())) == 1:
            found[name] = next(iter(alike[canonical_of(twin)]))  # norms in a list of their own, longer than the twin's
        elif name not in held:
            unknown.append(name)
    if unknown:
        raise AnatomyError(_message(model, unknown))
    return found


def partly_held(shapes: dict[str, tuple[int, ...]], drafts: list[Draft]) -> dict[str, np.ndarray]:
    """Tensors of which units hold some entries but not all, with a mask of those they hold."""
    held: dict[str, np.ndarray] = {}
    for draft in drafts:
        for slot in draft.slots:
            if not isinstance(slot.name, str):
                continue
            mask = held.setdefault(slot.name, np.zeros(shapes[slot.name], dtype=bool))
            if not slot.index:
                mask[...] = True
                continue
            dims = sorted(slot.index)
            view = np.moveaxis(mask, dims, range(len(dims)))
            shape = lambda i, w: [draft.count] + [w if j == i else 1 for j in range(len(dims))]  # noqa: E731, B023
            view[tuple(slot.index[d].reshape(shape(i, slot.index[d].shape[1])) for i, d in enumerate(dims))] = True
    return {name: mask for name, mask in held.items() if not mask.all()}


def _open(name: str, mask: np.ndarray, seen: Survey) -> bool:
    """Whether some entries of a mask are read by nobody but their block, and so should be in some unit."""
    private = seen.reach.private(name)
    return private is not None and bool((private.numpy() & mask).any())


def _reason(name: str, ndim: int, seen: Survey, riders: set, latent: dict, weights: set) -> str | None:
    reach = seen.reach
    live = name in reach.inside or name in reach.leaks
    if live and ndim > 1 and (name not in weights or DISGUISED in seen.trace.uses.get(name, ())) and _hides(name, seen):
        return None
    if name in riders:
        return "output bias"
    if name in latent:
        return latent[name]
    if name in seen.trace.embedded:
        return "embedding" if seen.blocks[name] == "" else "shared relative position bias"
    if name not in reach.inside and name not in reach.leaks and name not in weights:
        return "unused"
    if ndim <= 1:
        return "norm" if "bias" not in name.rpartition(".")[2] else "bias"  # a norm's own bias: see structural_of
    if seen.blocks[name] == "":
        return "outside the blocks"
    if reach.private(name) is None:
        return "residual projection" if name in weights and name in reach.ends else "read by several blocks"
    return "mixes residual streams"


def _hides(name: str, seen: Survey) -> bool:
    """Whether a matrix does its work in a way that no trace sees; looking up, adding and scaling are no products."""
    if sum(n > 1 for n in seen.trace.tensors[name].shape) < 2 or name in seen.trace.embedded:
        return False
    uses = seen.trace.uses.get(name, set())
    inside = bool(seen.blocks[name]) or not any(seen.blocks.values())
    return inside and (not uses or DISGUISED in uses)


def _message(model, unknown: list[str]) -> str:  # type: ignore[no-untyped-def]
    modules = dict(model.named_modules())
    places = list(dict.fromkeys(name.rpartition(".")[0] for name in unknown))
    shown = ", ".join(f"{place} ({type(modules[place]).__name__})" for place in places[:4])
    more = f" and {len(places) - 4} more" if len(places) > 4 else ""
    return (
        f"{shown}{more}: the layout of these modules of {type(model).__name__} is unknown: their weights take part in "
        "the computation but form no units that survive a swap test. To go on without units there, name them: "
        f"gs.dissect(model, structural=[{places[0]!r}])."
    )
