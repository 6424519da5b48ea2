"""Training in rotated coordinates themselves: ``W~`` is the parameter, every forward makes ``W = W~ U^T`` from it.

The form in which WaRP was published (Kim et al. 2023, ICLR, section 3.2). Under an optimizer that looks at single
entries (Adam) it takes other steps than `gs.rotate`, which keeps ``W``; under SGD the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.space import ParameterSpace, require_same_space, require_unpacked, unwrap
from gradsurgery.errors import PlanError
from gradsurgery.estimators.basis import Basis
from gradsurgery.estimators.importance import rotated
from gradsurgery.estimators.masks import Masks
from gradsurgery.tensors import is_sharded


@contextmanager
def reparametrised(
    model: nn.Module, basis: Basis, important: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside the block the weights of a basis are parameters ``W~ = W U`` (``V^T W`` at the output side).

    The class of their layers and their names in ``state_dict`` change inside (``weight`` becomes ``weight_rotated``);
    when the block ends, also by an exception, every parameter is the object that it was, and holds what was learned.
    ``W~`` is kept in fp32 where the model is in half precision. Make the optimizer, any, inside.

    Args:
        model: The model, before it is sharded, wrapped or compiled.
        basis: A complete basis, ``[n, n]``.
        important: Masks of coordinates that stay as they are, whatever the optimizer does to their entries of ``W~``.

    Yields:
        ``W~`` by the name of its weight.

    Raises:
        SelectionError: a basis of another model, masks that do not fit.
        PlanError: a basis that keeps some directions only, weights that are quantised, sharded, or shared by layers.

    Example:
        >>> basis = gs.estimators.activation_basis(model, [batch], "down_proj")
        >>> with gs.reparametrised(model, basis) as rotated:
        ...     optimizer = torch.optim.AdamW(rotated.values(), lr=1e-3)
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        >>> type(model.model.layers[0].mlp.down_proj).__name__
        'Linear'
    """
    base = unwrap(model)
    require_same_space(basis.space, space := ParameterSpace.of(base), "the basis")
    require_unpacked(space, basis.sites, "reparametrised")
    masks = important if isinstance(important, Masks) or important is None else Masks.of(basis, important)
    found = {name: _owner(base, basis, name) for name in basis.sites}
    with ExitStack() as stack:
        out = {}
        for name, (module, own) in found.items():
            mask = masks[name] if masks is not None and name in masks else None
            out[name] = stack.enter_context(_rotated_weight(module, own, basis, name, mask))
        yield out


def _owner(base: nn.Module, basis: Basis, name: str) -> tuple[nn.Module, str]:
    """The layer that holds a weight, and what it calls it."""
    parameter = base.get_parameter(name)
    owners = {
        (module, own)
        for module in base.modules()
        for own, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if p is parameter
    }
    if len(owners) > 1:
        raise PlanError(
            f"reparametrised: {name} is shared by {len(owners)} layers; gs.rotate keeps such weights as they are."
        )
    if is_sharded(parameter):
        raise PlanError(f"reparametrised: {name} is sharded; do it before fully_shard, or use gs.rotate.")
    if basis.rotated_shape(name) != basis.sizes(name):
        raise PlanError(
            f"reparametrised: the basis keeps coordinates {list(basis.rotated_shape(name))} of {name}, which is "
            f"{list(basis.sizes(name))}; make it without top_k."
        )
    return owners.pop()


@contextmanager
def _rotated_weight(
    module: nn.Module, own: str, basis: Basis, name: str, mask: Tensor | None
) -> Iterator[nn.Parameter]:
    """One weight as a property of its layer, made from a parameter of another name."""
    parameter, order, kind, grad = module._parameters[own], list(module._parameters), type(module), None
    assert parameter is not None
    grad, parameter.grad = parameter.grad, None
    weight = nn.Parameter(rotated(basis, name, parameter), requires_grad=parameter.requires_grad)
    fold = _folding(basis, name, weight, parameter, mask)
    del module._parameters[own]
    parameter.data = parameter.data.new_empty(0)  # what is trained is the only copy
    module.register_parameter(f"{own}_rotated", weight)
    module.__class__ = type(f"Rotated{kind.__name__}", (kind,), {own: property(lambda _: fold())})
    try:
        yield weight
    finally:
        module.__class__ = kind
        del module._parameters[f"{own}_rotated"]
        with torch.no_grad():
            parameter.data = fold().contiguous()
        parameter.grad = grad
        kept = {**module._parameters, own: parameter}
        for each in order:
            module._parameters.pop(each, None)
            module._parameters[each] = kept[each]


def _folding(
    basis: Basis, name: str, weight: nn.Parameter, parameter: nn.Parameter, mask: Tensor | None
) -> Callable[[], Any]:
    """Makes the weight from its rotated form, in the dtype and shape that it had."""
    layout, side, dtype, shape = basis.site(name).layout, basis.side, parameter.dtype, tuple(parameter.shape)
    device = parameter.device.type
    found = basis.vectors[basis.site(name).key]
    vectors = found.to(weight) if found is not None else None
    mask = mask.to(weight.device).expand(weight.shape) if mask is not None else None
    held = weight.detach()[mask] if mask is not None else None

    def fold() -> Tensor:
        with torch.autocast(device, enabled=False):
            own: Tensor = weight if mask is None else weight.masked_scatter(mask, held)  # type: ignore[arg-type]
            if vectors is not None:
                own = own @ vectors.mT if side == "input" else vectors @ own
            return layout.weight(own, shape).to(dtype)

    return fold
