"""How one module runs under its program: by layer type, from exact and cheap to exact and general."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsurgery.anatomy.space import own_class
from gradsurgery.transforms.engine.adjoint import changes_of, parameter_of, set_parameter, under_adjoint
from gradsurgery.transforms.engine.linear_op import LinearPlan, compiled_linear, surgical_linear
from gradsurgery.transforms.engine.program import Program
from gradsurgery.transforms.engine.run import Run

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Handler:
    """Runs a module under a program: ``before`` may change its call, ``after`` its output. Pure but for a stack."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        self.program = program

    def begin(self, run: Run) -> None:
        """Before the forwards of a pass, outside of any compiled graph."""

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        return call

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        return output

    def reset(self, module: nn.Module) -> None:
        """Forget a call that was interrupted."""


class LinearHandler(Handler):
    """Exact ``nn.Linear`` and ``Conv1D``: the module computes on an empty slice, the plan gives the real output."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        transposed = own_class(module) is Conv1D
        shape = tuple(module.weight.shape)  # type: ignore[union-attr, arg-type]
        self.plan = LinearPlan(program, shape, shape[1] if transposed else shape[0], transposed)
        self.inputs: list[Tensor | None] = []

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        (x, *rest), kwargs = call if call[0] else ((call[1]["input"],), {})
        if not torch.compiler.is_compiling():
            classes = run.classes(self.program, tuple(x.shape[:-1]), x.device)
            if self.plan.idle(classes, run.passes):  # nothing to do for these rows: the stock layer runs
                self.inputs.append(None)
                return call
        self.inputs.append(x)
        return (x.reshape(-1, x.shape[-1])[:0], *rest), kwargs

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        x = self.inputs.pop()
        if x is None:
            return output
        weight: Any = module.weight
        bias: Any = module.bias
        if torch.is_autocast_enabled(x.device.type):
            x, weight, bias = (
                t.to(output.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, weight, bias)
            )
        lead = tuple(x.shape[:-1])
        if torch.compiler.is_compiling():
            flags = run.stacked(self.program, lead, x.device)
            return compiled_linear(x, weight, bias, self.plan, flags, run.passes)
        classes = run.classes(self.program, lead, x.device)
        return surgical_linear(x, weight, bias, self.plan, classes, run.passes)

    def reset(self, module: nn.Module) -> None:
        self.inputs.clear()


class SwapHandler(Handler):
    """Any module, every row: its parameters are identity-forward functions of themselves while it runs."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        self.own: list[dict[str, Any]] = []

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        self.own.append({name: parameter_of(module, name) for name in self.program.atoms})
        for name, atoms in self.program.atoms.items():
            weight = parameter_of(module, name)
            if weight is not None:
                set_parameter(module, name, under_adjoint(weight, changes_of(atoms, 0, run.passes)))
        return call

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        self._restore(module)
        return output

    def _restore(self, module: nn.Module) -> None:
        for name, parameter in self.own.pop().items():
            set_parameter(module, name, parameter)

    def reset(self, module: nn.Module) -> None:
        while self.own:
            self._restore(module)
