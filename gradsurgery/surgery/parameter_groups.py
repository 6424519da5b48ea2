"""Layer-wise learning rates as optimizer groups: early layers move less than late ones.

Discriminative finetuning: Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", arXiv
1801.06146, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from gradsurgery.anatomy.discovery.partition import is_list
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import Names, region
from gradsurgery.anatomy.space import ParameterSpace, require_same_space, unwrap
from gradsurgery.errors import PlanError, SelectionError


def parameter_groups(
    model: nn.Module,
    lr: float,
    depth: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    embeddings: float | None = None,
    head: float = 1.0,
    weight_decay: float = 0.01,
    no_decay: Region | Names | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups whose learning rates grow with depth.

    The blocks of a model are the elements of its outermost lists of modules; each list (an encoder's, a decoder's) is
    cut into as many equal parts as ``depth`` has factors. Embeddings are ``nn.Embedding`` outside of the blocks and
    what else is registered before the first block; all others (output heads, and norms right beside the blocks, which
    some models register before them) count as the head. A tied weight goes where its first name is: with the
    embeddings.

    Args:
        model: The model; parameters that do not train are left out.
        lr: Learning rate that the factors multiply.
        depth: Factors of the blocks, from the input on.
        embeddings: Factor of the embeddings; the first of ``depth`` by default.
        head: Factor of everything behind the blocks.
        weight_decay: Of all groups but ``no_decay``.
        no_decay: Parameters without weight decay, by name or as a region of whole tensors; by default those of fewer
            than two dimensions (biases, norms), ``()`` for none.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and a ``name``, every trained parameter in exactly one.

    Raises:
        PlanError: factors out of range, or a model without blocks.
        SelectionError: nothing trains, or ``no_decay`` holds parts of tensors.

    Example:
        >>> groups = gs.parameter_groups(model, lr=1e-5, depth=(0.5, 1.0))
        >>> [(group["name"], group["lr"]) for group in groups if group["weight_decay"]]
        [('embeddings', 5e-06), ('blocks 1/2', 5e-06), ('blocks 2/2', 1e-05), ('head', 1e-05)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    base = unwrap(model)
    factors = list(depth)
    if not factors:
        raise PlanError("parameter_groups: depth has one factor or more, from the input on.")
    first = factors[0] if embeddings is None else embeddings
    numbers = {"lr": lr, "embeddings": first, "head": head, "weight_decay": weight_decay}
    for name, value in (*numbers.items(), *(("depth", factor) for factor in factors)):
        _require_factor(name, value)
    names = ["embeddings", *(f"blocks {k + 1}/{len(factors)}" for k in range(len(factors))), "head"]
    rates = dict(zip(names, (first, *factors, head), strict=True))
    places = places_of(base, len(factors))
    plain = _without_decay(base, no_decay)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in base.named_parameters():  # a tied weight once, under its first name
        if parameter.requires_grad:
            at = places[name]
            place = at if isinstance(at, str) else names[1 + at]
            groups.setdefault((place, name in plain), []).append(parameter)
    if not groups:
        raise SelectionError(f"parameter_groups: no parameter of {type(base).__name__} trains.")
    return [
        {
            "params": groups[place, bare],
            "lr": lr * rates[place],
            "weight_decay": 0.0 if bare else weight_decay,
            "name": place,
        }
        for place in names
        for bare in (False, True)
        if (place, bare) in groups
    ]


def places_of(base: nn.Module, parts: int) -> dict[str, str | int]:
    """By parameter ``"embeddings"``, ``"head"``, or the part of the blocks that it lies in."""
    stacks = stacks_of(base)
    if not stacks:
        raise PlanError(
            f"parameter_groups: {type(base).__name__} has no list of blocks to tell early from late by; give the "
            f"optimizer groups of your own."
        )
    tables = {path for path, module in base.named_modules() if isinstance(module, nn.Embedding)}
    beside = {path.rpartition(".")[0] for path in stacks}
    out: dict[str, str | int] = {}
    reached = False
    for name, _ in base.named_parameters():
        stack = next((path for path in stacks if name.startswith(f"{path}.")), None)
        if stack is not None:
            number = int(name[len(stack) + 1 :].split(".", 1)[0])
            out[name], reached = number * parts // stacks[stack], True
            continue
        module = name.rpartition(".")[0]
        holds = list(base.get_submodule(module).parameters(recurse=False))
        final = module.rpartition(".")[0] in beside and all(p.dim() < 2 for p in holds)
        out[name] = "embeddings" if module in tables or not (reached or final) else "head"
    return out


def stacks_of(base: nn.Module) -> dict[str, int]:
    """Length by path of the outermost lists of modules that have parts of their own."""
    found: dict[str, int] = {}
    for path, module in base.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and not isinstance(module, nn.ModuleDict) and is_list(module):
            parts = list(module.children())
            if len(parts) > 1 and any(next(part.children(), None) is not None for part in parts):
                found[path] = len(parts)
    return found


def _without_decay(base: nn.Module, no_decay: Region | Names | None) -> set[str]:
    if no_decay is None:
        return {name for name, p in base.named_parameters() if p.dim() < 2}
    if not isinstance(no_decay, Region):
        return set(region(base, no_decay).parameters()) if no_decay else set()
    require_same_space(no_decay.space, ParameterSpace.of(base), "parameter_groups: no_decay")
    parts = [name for name, part in no_decay.entries.items() if not part.whole]
    if parts:
        raise SelectionError(
            f"parameter_groups: no_decay holds parts of {parts[0]}, and an optimizer decays whole tensors; "
            f"gs.decay_to(region) decays entries."
        )
    return set(no_decay.parameters())


def _require_factor(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise PlanError(f"parameter_groups: {name} is a number from 0, not {value!r}.")
