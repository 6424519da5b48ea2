"""Slow and obvious ways to get the gradients that a transform should give: one example at a time, plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import gradsurgery as gs
from tests.transforms.cases import BATCH, LENGTH, Case, gradients

Grads = dict[str, Tensor]


def summed(parts: list[Grads]) -> Grads:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def flagged_examples(where: Tensor | None) -> list[bool]:
    return [True] * BATCH if where is None else where.tolist()


def by_example(case: Case, one: Callable[[int, bool], Grads], where: Tensor | None) -> Grads:
    return summed([one(i, flag) for i, flag in enumerate(flagged_examples(where))])


def plain(case: Case, i: int, model: nn.Module | None = None) -> Grads:
    model = case.model if model is None else model
    return gradients(model, case.loss(model, case.example(i), first=i))


def scaled(case: Case, region: gs.Region, factor: float, where: Tensor | None) -> Grads:
    """Every example's gradient on its own, times ``factor`` at the region if it is flagged."""

    def one(i: int, flag: bool) -> Grads:
        out = plain(case, i)
        if flag:
            for name in out:
                inside = region.of(name).mask()
                out[name] = torch.where(
                    inside, torch.zeros_like(out[name]) if factor == 0 else factor * out[name], out[name]
                )
        return out

    return by_example(case, one, where)


def zeroed(case: Case, units: gs.Units, where: Tensor | None) -> Grads:
    """Flagged examples on an ablated copy, whose consumer columns read nothing and so learn nothing."""
    ablated = case.copy()
    with torch.no_grad():
        for name, parameter in ablated.named_parameters():
            parameter[units.consumers.of(name).mask()] = 0.0

    def one(i: int, flag: bool) -> Grads:
        if not flag:
            return plain(case, i)
        out = plain(case, i, ablated)
        return {name: g.masked_fill(units.consumers.of(name).mask(), 0.0) for name, g in out.items()}

    return by_example(case, one, where)


def detached(case: Case, units: gs.Units, where: Tensor | None) -> Grads:
    """A copy whose consumers read ``torch.where(flag, x.detach(), x)`` at the units' columns."""
    model = case.copy()
    columns: dict[str, Tensor] = {name: part.mask() for name, part in units.consumers.entries.items()}
    for path, module in model.named_modules():
        for attribute, _ in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if name not in columns:
                continue
            if columns[name].dim() == 3:
                module.forward = _experts(module, columns[name], where)  # type: ignore[method-assign]
            else:
                module.register_forward_pre_hook(_detach_columns(module, columns[name], where))
    return gradients(model, case.loss(model))


def rows_of(where: Tensor | None, x: Tensor) -> Tensor:
    """Flags of the rows of ``[batch, token, …]``, ``[batch, head, token, …]`` or ``[batch * token, …]``, to expand."""
    if where is None:
        return torch.ones((), dtype=torch.bool)
    if x.shape[0] not in (1, BATCH):
        where = where.reshape(-1) if where.dim() == 2 else where.repeat_interleave(x.shape[0] // BATCH)
    elif where.dim() == 2 and x.shape[0] == BATCH and x.shape[1] != LENGTH:
        where = where[:, None]
    return where.reshape(*where.shape, *[1] * (x.dim() - where.dim()))


def _detach_columns(module: nn.Module, consumer: Tensor, where: Tensor | None) -> Callable[..., Any]:
    features = consumer.any(1) if type(module).__name__ == "Conv1D" else consumer.any(0)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = args
        return (torch.where(rows_of(where, x) & features, x.detach(), x),)

    return hook


def _experts(module: Any, consumer: Tensor, where: Tensor | None) -> Callable[..., Tensor]:
    """Every expert on every row, the activations of flagged rows detached where ``consumer`` reads them."""
    inward = type(module).__name__ == "GptOssExperts"  # weights stored [in, out]

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        share = torch.zeros(x.shape[0], module.num_experts, dtype=x.dtype).scatter(
            1, top_k_index, top_k_weights.to(x.dtype)
        )
        out = torch.zeros_like(x)
        for e in range(module.num_experts):
            if inward:
                h = module._apply_gate(x @ module.gate_up_proj[e] + module.gate_up_proj_bias[e])
                features = consumer[e].any(1)
            else:
                gate, up = (x @ module.gate_up_proj[e].T).chunk(2, dim=-1)
                h = module.act_fn(gate) * up
                features = consumer[e].any(0)
            h = torch.where(rows_of(where, h) & features, h.detach(), h)
            y = h @ module.down_proj[e] + module.down_proj_bias[e] if inward else h @ module.down_proj[e].T
            out = out + share[:, e, None] * y
        return out.reshape(hidden_states.shape)

    return forward


def scaled_by_row(case: Case, region: gs.Region, factor: float, where: Tensor | None) -> Grads:
    """Every module with own parameters runs twice, flagged rows of the output from a second set of parameters."""
    model = case.copy()
    twins: dict[str, nn.Parameter] = {}
    canonical = case.anatomy.space.canonical
    for name, parameter in case.model.named_parameters():
        if name in region.entries:
            twins[name] = nn.Parameter(parameter.detach().clone())
    for path, module in model.named_modules():
        mine: dict[str, Tensor] = {}
        for attribute, _ in module.named_parameters(recurse=False):
            name = canonical(f"{path}.{attribute}" if path else attribute)
            if name in twins:
                mine[attribute] = twins[name]
        if mine:
            module.forward = _doubled(module, mine, where)  # type: ignore[method-assign]
    loss = case.loss(model)
    grads = torch.autograd.grad(loss, list(twins.values()), retain_graph=True, allow_unused=True)
    out = gradients(model, loss)
    for (name, parameter), flagged in zip(twins.items(), grads, strict=True):
        flagged = torch.zeros_like(parameter) if flagged is None else flagged
        out[name] = out[name] + torch.where(region.of(name).mask(), factor * flagged, flagged)
    return out


def _doubled(module: nn.Module, mine: dict[str, Tensor], where: Tensor | None) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        module.forward = own  # type: ignore[method-assign]
        try:
            stock, other = own(*args, **kwargs), functional_call(module, mine, args, kwargs)
        finally:
            module.forward = forward  # type: ignore[method-assign]
        return _chosen(where, other, stock)

    return forward


def _chosen(where: Tensor | None, one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(_chosen(where, a, b) for a, b in zip(one, other, strict=True))
    return torch.where(rows_of(where, one), one, other) if isinstance(one, Tensor) and one.is_floating_point() else one
