"""Linear layers under a program, for autograd: one function in eager mode, one custom operator under ``torch.compile``.

The operator takes the flags as a tensor, so that a compiled model does not recompile when labels change.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from gradsurgery.anatomy.entries import Entries
from gradsurgery.transforms.engine.linear import Edits, bias_gradient, flagged, input_gradient, output, weight_gradient
from gradsurgery.transforms.engine.program import Atom, Program
from gradsurgery.transforms.engine.rows import RowClasses

_numbers = itertools.count()
_plans: weakref.WeakValueDictionary[int, LinearPlan] = weakref.WeakValueDictionary()


class LinearPlan:
    """A program bound to a linear layer.

    Args:
        program: What happens to the layer's weight, bias and input.
        weight_shape: Shape of the weight as stored.
        out_features: Size of the bias.
        transposed: The weight is stored ``[in, out]`` (``Conv1D``).
    """

    def __init__(self, program: Program, weight_shape: tuple[int, ...], out_features: int, transposed: bool) -> None:
        self.program, self.transposed = program, transposed
        self.edits = Edits(program.edits.get("weight", ()), 0 if transposed else 1)
        self.weight_atoms = program.atoms.get("weight") or [Atom(Entries.full(weight_shape), ())]
        self.bias_atoms = program.atoms.get("bias") or [Atom(Entries.full((out_features,)), ())]
        self._idle: dict[tuple[tuple[int, ...], int], bool] = {}
        self.number = next(_numbers)
        _plans[self.number] = self

    def idle(self, classes: RowClasses, passes: int) -> bool:
        """Whether rows of these classes run as in the stock layer."""
        key = (classes.codes, passes)
        if key not in self._idle:
            atoms = (*self.weight_atoms, *self.bias_atoms)
            plain = all(atom.factor(code, passes) == 1.0 for atom in atoms for code in classes.codes)
            edited = any(not flagged(classes, column).none for _, column in (*self.edits.zero, *self.edits.detach))
            self._idle[key] = plain and not edited
        return self._idle[key]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, classes: RowClasses) -> Tensor:
        weight_OI = weight.T if self.transposed else weight
        y_NO = output(x.reshape(-1, x.shape[-1]), weight_OI, bias, self.edits, classes)
        return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], classes: RowClasses, passes: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dy_NO, x_NI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = dw = db = None
        if needs[0]:
            weight_OI = weight.T if self.transposed else weight
            dx = input_gradient(dy_NO, weight_OI, self.edits, classes).reshape(x.shape)
        if needs[1]:
            left, right = (x_NI, dy_NO) if self.transposed else (dy_NO, x_NI)
            dw = weight_gradient(left, right, self.weight_atoms, classes, passes)
        if needs[2]:
            db = bias_gradient(dy_NO, self.bias_atoms, classes, passes)
        return dx, dw, db


class _SurgicalLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearPlan, classes: RowClasses, passes: int
    ):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.rest = plan, classes, passes
        return plan.forward(x, weight, bias, classes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def, override]
        x, weight = ctx.saved_tensors
        plan, classes, passes = ctx.rest
        return *plan.backward(dy, x, weight, ctx.needs_input_grad[:3], classes, passes), None, None, None


@torch.library.custom_op("gradsurgery::linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, flags_WN: Tensor, plan: int, passes: int) -> Tensor:
    return _plans[plan].forward(x, weight, bias, RowClasses.of(flags_WN, x.device))


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, flags_WN: Tensor, plan: int, passes: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1] if _plans[plan].transposed else weight.shape[0])


@torch.library.custom_op("gradsurgery::linear_backward", mutates_args=())
def _linear_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, flags_WN: Tensor, plan: int, passes: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    classes = RowClasses.of(flags_WN, x.device)
    grads = _plans[plan].backward(dy, x, weight, (needs[0], needs[1], needs[2]), classes, passes)
    dx, dw, db = (grad if grad is not None else x.new_empty(0) for grad in grads)
    return dx, dw, db


@_linear_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, flags_WN: Tensor, plan: int, passes: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    empty = x.new_empty(0)
    return (
        torch.empty_like(x) if needs[0] else empty,
        torch.empty_like(weight) if needs[1] else x.new_empty(0),
        dy.new_empty(dy.shape[-1]) if needs[2] else x.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, flags_WN, plan, passes = inputs
    ctx.save_for_backward(x, weight, flags_WN)
    ctx.rest = plan, passes, bias is not None


def _backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
    x, weight, flags_WN = ctx.saved_tensors
    plan, passes, has_bias = ctx.rest
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], has_bias and ctx.needs_input_grad[2]]
    grads = torch.ops.gradsurgery.linear_backward(dy, x, weight, flags_WN, plan, passes, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


torch.library.register_autograd("gradsurgery::linear", _backward, setup_context=_setup)


def surgical_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearPlan, classes: RowClasses, passes: int
) -> Tensor:
    """The layer under its plan, eager."""
    return _SurgicalLinear.apply(x, weight, bias, plan, classes, passes)


def compiled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearPlan, flags_WN: Tensor, passes: int
) -> Tensor:
    """The layer under its plan as an operator that ``torch.compile`` keeps whole."""
    return torch.ops.gradsurgery.linear(x, weight, bias, flags_WN, plan.number, passes)
