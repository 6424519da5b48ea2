"""Linear layers of tensor-parallel models under a program: each rank runs its part of it on its part of the weight.

The layer's own forward still lays inputs and outputs out over ranks, and reduces them; only the product inside it is
replaced. A weight cut along its outputs reads whole inputs and writes a part of the outputs; one cut along its inputs
reads the features of its units and writes a partial sum of all outputs:

    y_r = x W_r^T + b_r        dx = sum_r dy_r W_r        (outputs: heads, neurons)
    y = sum_r x_r W_r^T + b    dx_r = dy W_r              (inputs: what heads and neurons are read by)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.anatomy.entries import Entries, all_bits
from gradsurgery.errors import PlanError
from gradsurgery.tensors import is_sharded, local_of
from gradsurgery.transforms.engine.adjoint import parameter_of, set_parameter
from gradsurgery.transforms.engine.handlers import Call, SwapHandler
from gradsurgery.transforms.engine.linear_op import LinearPlan, surgical_linear
from gradsurgery.transforms.engine.program import Atom, InputEdit, Program
from gradsurgery.transforms.engine.run import Run


def local_entries(entries: Entries, tensor: Tensor) -> Entries:
    """The entries that lie in this rank's part of a tensor, counted in it."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    out = Entries.empty(tuple(shape))
    for box in entries.boxes():
        mine = (bits >> start & all_bits(size) for bits, start, size in zip(box, offset, shape, strict=True))
        out = out | Entries.from_box(tuple(shape), tuple(mine))
    return out


def local_program(program: Program, module: nn.Module) -> Program:
    """What a program means for this rank's part of a layer."""
    atoms: dict[str, list[Atom]] = {}
    for name, parts in program.atoms.items():
        if (tensor := parameter_of(module, name)) is not None:
            held = [Atom(local_entries(atom.entries, tensor), atom.factors) for atom in parts]
            atoms[name] = sorted((atom for atom in held if atom.entries), key=lambda atom: -atom.entries.numel())
    edits: dict[str, list[InputEdit]] = {}
    for name, all_edits in program.edits.items():
        weight: Any = parameter_of(module, name)
        mine = [InputEdit(local_entries(edit.entries, weight), edit.kind, edit.column) for edit in all_edits]
        edits[name] = [edit for edit in mine if edit.entries]
    return Program(program.path, program.wheres, atoms, edits)


class ParallelLinearHandler(SwapHandler):
    """An ``nn.Linear`` whose weight lies cut on ranks: a stand-in for the weight multiplies as its program says."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        weight: Any = module.weight
        mine = local_program(program, module)
        self.whole = LinearPlan(program, tuple(weight.shape), weight.shape[0], transposed=False)
        local = tuple(weight.to_local().shape)
        self.plan = LinearPlan(mine, local, local[0], transposed=False)

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        weight: Any = parameter_of(module, "weight")
        self.own.append({"weight": weight})
        set_parameter(module, "weight", _StandIn(functools.partial(self.linear, weight, run)))  # type: ignore[arg-type]
        return call

    def linear(self, weight: Any, run: Run, x: Any, bias: Any) -> Tensor:
        """``x W^T + b`` in the layout in which the layer's forward expects it."""
        from torch.distributed.tensor import DTensor, Partial, Shard

        classes = run.classes(self.program, tuple(x.shape[:-1]), x.device)
        laid_out, (placement,), mesh = is_sharded(x), weight.placements, weight.device_mesh
        if self.whole.idle(classes, run.passes):  # of all of the layer, so that all ranks do the same
            return F.linear(x, weight if laid_out else weight.to_local(), bias)
        by_inputs = placement.dim % 2 == 1
        if laid_out:
            x = x.to_local() if by_inputs else x.to_local(grad_placements=[Partial()])
        weight_r, bias_r = weight.to_local(), None if bias is None else local_of(bias)
        if by_inputs and bias_r is not None:
            bias_r = _Once.apply(bias_r, mesh.get_local_rank() == 0)
        if torch.is_autocast_enabled(x.device.type):
            narrow = torch.get_autocast_dtype(x.device.type)
            x, weight_r, bias_r = x.to(narrow), weight_r.to(narrow), None if bias_r is None else bias_r.to(narrow)
        y = surgical_linear(x, weight_r, bias_r, self.plan, classes, run.passes)
        if not laid_out:
            return y
        if by_inputs:
            return DTensor.from_local(y, mesh, [Partial()], run_check=False)
        shape = torch.empty(*y.shape[:-1], weight.shape[0], device="meta")
        return DTensor.from_local(y, mesh, [Shard(-1)], run_check=False, shape=shape.shape, stride=shape.stride())


class _StandIn:
    """Takes the place of a weight in ``F.linear``."""

    def __init__(self, linear: Callable[[Any, Any], Tensor]) -> None:
        self.linear = linear

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})}
        if func is not F.linear or not isinstance(given["weight"], cls):
            raise PlanError(f"a tensor-parallel layer calls {func} on its weight, where surgery expects F.linear.")
        out: Tensor = given["weight"].linear(given["input"], given.get("bias"))
        return out


class _Once(torch.autograd.Function):
    """A bias that all ranks hold, as a part of their sum: on the first rank alone. Each has its whole gradient."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, first: bool) -> Tensor:  # type: ignore[override]
        return bias.view_as(bias) if first else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def, override]
        return grad, None
