"""The exact fallback where a layer cannot tell examples apart: run it once per class of rows.

Row-wise modules (norms, fused experts) run on complementary parts of their rows; modules that mix rows (attention with
sinks, state-space mixers) run on everything, and each row of the output comes from the run of its class.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradsurgery.errors import PlanError
from gradsurgery.transforms.engine.adjoint import (
    changes_of,
    parameter_of,
    swapped,
    under_adjoint,
)
from gradsurgery.transforms.engine.calls import lead_of, map_rows, refuse_caches
from gradsurgery.transforms.engine.experts import run_without
from gradsurgery.transforms.engine.flags import output_flags
from gradsurgery.transforms.engine.handlers import Call, Handler
from gradsurgery.transforms.engine.program import Program
from gradsurgery.transforms.engine.rows import Rows
from gradsurgery.transforms.engine.run import Run

_MIXING = ("Batch", "Group", "Instance", "2d", "3d")


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises each row by itself, over its last dimension."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) == 1
    name = type(module).__name__
    channels_first = getattr(module, "data_format", "") == "channels_first"
    return ("LayerNorm" in name or "RMSNorm" in name) and not channels_first and not any(n in name for n in _MIXING)


def refuse_running_statistics(path: str, module: nn.Module) -> None:
    """Running a module once per class of rows would update the running statistics of batch norms several times."""
    for part in module.modules():
        tracks = getattr(part, "track_running_stats", getattr(part, "running_mean", None) is not None)
        known = isinstance(part, _NormBase) or "BatchNorm" in type(part).__name__
        if known and part.training and tracks:
            raise PlanError(
                f"{path} ({type(module).__name__}) keeps running statistics, and where=… runs it once per class of "
                f"rows, which would update them twice. Put it in eval mode, or leave it out of the region."
            )


def is_row_wise(module: nn.Module) -> bool:
    """Whether each row of the module's output depends on the same row of its tensor inputs alone."""
    named = type(module).__name__.endswith(("Experts", "NaiveMoe"))  # the second until transformers 5.12
    return is_norm(module) or (named and any(p.dim() == 3 for p in module.parameters(recurse=False)))


class RerunHandler(Handler):
    """Weight effects with labels, and edits of activations inside fused experts, by running the module per class."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        self.row_wise = is_row_wise(module)
        self.calls: list[tuple[Call, Any, bool]] = []
        if program.edits and not self.row_wise:
            name = type(module).__name__
            raise PlanError(
                f"{program.path} ({name}) reads units inside its own computation, where rows cannot be edited one by "
                f"one; leave its units out of zero and detach, or mask their parameters instead."
            )

    def classes_of(self, code: int, run: Run) -> tuple[Any, ...]:
        """What happens to rows of a class: codes with equal keys run together."""
        factors = tuple(atom.factor(code, run.passes) for atoms in self.program.atoms.values() for atom in atoms)
        edits = tuple(
            (attribute, k)
            for attribute, edits in self.program.edits.items()
            for k, edit in enumerate(edits)
            if edit.column < 0 or code >> edit.column & 1
        )
        return factors, edits

    def groups(self, run: Run) -> list[list[int]]:
        """All class codes, by treatment; the same on every rank, whatever its batch holds."""
        found: dict[tuple[Any, ...], list[int]] = {}
        for code in range(1 << len(self.program.wheres)):
            found.setdefault(self.classes_of(code, run), []).append(code)
        return list(found.values())

    def before(self, module: nn.Module, call: Call, run: Run) -> Call:
        refuse_caches(self.program.path, call)
        if self.program.per_row and not self.row_wise:
            refuse_running_statistics(self.program.path, module)
        compiling = torch.compiler.is_compiling()
        # rows picked by label have sizes that only data know, which would break a compiled graph: norms run on all
        split = self.row_wise and not (compiling and not self.program.edits and is_norm(module))
        state = torch.get_rng_state() if module.training and not compiling else None
        self.calls.append((call, state, split))
        if not split:
            return call
        args, kwargs = call  # the stock run sees no rows: every class runs on its own in ``after``
        lead = lead_of(args, kwargs)
        return map_rows(call, lead, lambda x: x[:0])

    def after(self, module: nn.Module, output: Any, run: Run) -> Any:
        call, state, split = self.calls.pop()
        if split:
            return self._split(module, call, run)
        return self._select(module, call, output, state, run)

    def reset(self, module: nn.Module) -> None:
        self.calls.clear()

    def _split(self, module: nn.Module, call: Call, run: Run) -> Any:
        lead = lead_of(*call)
        device = next(x.device for x in (*call[0], *call[1].values()) if isinstance(x, Tensor))
        classes = run.classes(self.program, lead, device)
        parts: list[tuple[Rows, Tensor]] = []
        for codes in self.groups(run):
            rows = classes.rows(frozenset(codes).__contains__)
            if not rows.none:
                part = map_rows(call, lead, rows.take)
                parts.append((rows, self._run(module, part, codes[0], run)))
        first = parts[0][1]
        if len(parts) == 1:
            return first.reshape(*lead, *first.shape[1:])
        order = torch.arange(classes.count, device=device)
        back = torch.cat([rows.take(order) for rows, _ in parts]).argsort()
        return torch.cat([y for _, y in parts]).index_select(0, back).reshape(*lead, *first.shape[1:])

    def _select(self, module: nn.Module, call: Call, output: Any, state: Any, run: Run) -> Any:
        for codes in self.groups(run):
            if not any(changes_of(atoms, codes[0], run.passes) for atoms in self.program.atoms.values()):
                continue
            after_state = None
            if state is not None:  # the same dropout as in the stock run
                after_state = torch.get_rng_state()
                torch.set_rng_state(state)
            other = self._run(module, call, codes[0], run)
            if after_state is not None:
                torch.set_rng_state(after_state)
            output = self._merge(output, other, frozenset(codes), module, run)
        return output

    def _merge(self, plain: Any, other: Any, codes: frozenset[int], module: nn.Module, run: Run) -> Any:
        if isinstance(plain, tuple | list):
            parts = [self._merge(a, b, codes, module, run) for a, b in zip(plain, other, strict=True)]
            return type(plain)(*parts) if hasattr(plain, "_fields") else type(plain)(parts)
        if isinstance(plain, dict):
            merged = {k: self._merge(v, other[k], codes, module, run) for k, v in plain.items()}
            return type(plain)(**merged) if dataclasses.is_dataclass(plain) else type(plain)(merged)
        if not isinstance(plain, Tensor) or not plain.requires_grad:
            return plain
        convolves = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        given = run.all_flags(self.program)  # a router gives [batch * token, expert]
        lead, flags = output_flags(given, tuple(plain.shape), self.program.path, convolves, run.shape)
        chosen = torch.zeros(lead, dtype=torch.bool, device=plain.device)
        for code in codes:
            hit = torch.ones_like(chosen)
            for w, flag in enumerate(flags):
                hit &= flag.to(plain.device) == bool(code >> w & 1)
            chosen |= hit
        return torch.where(chosen.reshape(*lead, *[1] * (plain.dim() - len(lead))), other, plain)

    def _run(self, module: nn.Module, call: Call, code: int, run: Run) -> Any:
        """The module's own forward under what its program does to rows of one class."""
        args, kwargs = call
        weights = {}
        for name, atoms in self.program.atoms.items():
            if (weight := parameter_of(module, name)) is not None:
                weights[name] = under_adjoint(weight, changes_of(atoms, code, run.passes))
        edits = [
            (attribute, edit)
            for attribute, all_edits in self.program.edits.items()
            for edit in all_edits
            if edit.column < 0 or code >> edit.column & 1
        ]
        if not edits:
            with swapped(module, weights):
                return module.forward(*args, **kwargs)
        return run_without(module, call, weights, edits)
