"""Named tensors of several shapes over many orders of magnitude, and projections of them worked out the slow way."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.surgery.slots import Slots
from gradsurgery.transforms.stages import StepContext

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (5, 7),
    "a.bias": (5,),
    "b.experts": (2, 3, 4),
    "b.scale": (),
    "c.weight": (1, 6),
}
Named = dict[str, Tensor]


class Holder(nn.Module):
    """Parameters of the shapes above, in three modules."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in shapes.items():
            module, own = name.split(".")
            if not hasattr(self, module):
                self.add_module(module, nn.Module())
            getattr(self, module).register_parameter(own, nn.Parameter(torch.zeros(shape, dtype=dtype)))


def draw(seed: int, exponents: Sequence[int], dtype: torch.dtype, spread: int = 0) -> Named:
    """Normal entries of size ``10**exponent`` by tensor, times up to ``10**±spread`` by entry, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for (name, shape), exponent in zip(SHAPES.items(), exponents, strict=True):
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
        if spread:
            value *= 10.0 ** torch.randint(-spread, spread + 1, shape, generator=generator)
            value *= torch.rand(shape, generator=generator) > 0.1
        out[name] = value.to(dtype)
    return out


def blocks_of(scope: str, names: Sequence[str] = tuple(SHAPES)) -> list[list[tuple[str, Any]]]:
    """``(name, index)`` of the entries of every block."""
    if scope == "global":
        return [[(name, ...) for name in names]]
    if scope == "module":
        grouped = itertools.groupby(names, lambda name: name.split(".")[0])
        return [[(name, ...) for name in found] for _, found in grouped]
    if scope == "row":
        rows = [[(name, k)] for name in names if len(SHAPES[name]) > 1 for k in range(SHAPES[name][0])]
        return rows + [[(name, ...)] for name in names if len(SHAPES[name]) < 2]
    return [[(name, ...)] for name in names]


def flat(named: Named, block: list[tuple[str, Any]]) -> Tensor:
    """One block as a vector, fp64."""
    return torch.cat([named[name][index].double().reshape(-1) for name, index in block])


def project_slowly(g: Tensor, r: Sequence[Tensor], remove: str = "both", upwards: bool = False) -> Tensor:
    """What is left of ``g``, fp64: by least squares, or by trying every set of active constraints."""
    with torch.no_grad():
        if remove == "both":
            return _away(g, r)
        side = 1.0 if (remove == "conflict") != upwards else -1.0  # wanted: side * <g', r> >= 0
        best = None
        for size in range(len(r) + 1):
            for active in itertools.combinations(range(len(r)), size):
                left = _away(g, [r[k] for k in active])
                allowed = all(side * float(left @ v) >= -1e-13 * float(g.norm() * v.norm()) for v in r)
                if allowed and (best is None or (g - left).norm() < (g - best).norm()):
                    best = left
        assert best is not None
        return best


def _away(g: Tensor, r: Sequence[Tensor]) -> Tensor:
    unit = [v / v.norm() for v in r if v.norm() > 0]
    if not unit:
        return g.clone()
    q, values, _ = torch.linalg.svd(torch.stack(unit, 1), full_matrices=False)
    q = q[:, values > 1e-7 * values[0]]
    g = g - q @ (q.T @ g)
    return g - q @ (q.T @ g)


def run(
    transform: Any, g: Named, slots: Mapping[str, Named], dtype: torch.dtype = torch.float32, model: Any = None
) -> tuple[Named, StepContext]:
    """The main gradient after a transform of the gradient stage; parameters that ``g`` lacks have none."""
    model = model or Holder(dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.grad = g[name].clone() if name in g else None
    held = Slots()
    for slot, grads in slots.items():
        held.put(slot, {name: grad.clone() for name, grad in grads.items()})
    context = StepContext.of(model, slots=held)
    transform.apply(context, transform.init(gs.anatomy.space.ParameterSpace.of(model)))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, context
