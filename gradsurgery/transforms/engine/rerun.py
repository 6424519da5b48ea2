"""The exact fallback where a layer cannot tell examples apart: run it once per class of rows.

Row-wise modules (norms, fused experts) run on complementary parts of their rows; modules that mix rows (attention with
sinks, state-space mixers) run on everything, and each row of the output comes from the run of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.errors import BatchError, PlanError
from gradsurgery.transforms.engine.adjoint import changes_of, only_entries, swapped, under_adjoint, without_entries
from gradsurgery.transforms.engine.handlers import Call, Handler
from gradsurgery.transforms.engine.program import InputEdit, Program, box_columns
from gradsurgery.transforms.engine.rows import Rows
from gradsurgery.transforms.engine.run import Run, expand_flags


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or "Norm" in type(module).__name__


def is_row_wise(module: nn.Module) -> bool:
    """Whether each row of the module's output depends on the same row of its tensor inputs alone."""
    experts = type(module).__name__.endswith("Experts") and any(p.dim() == 3 for p in module.parameters(recurse=False))
    return is_norm(module) or experts


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
            output = self._merge(output, other, frozenset(codes), run)
        return output

    def _merge(self, plain: Any, other: Any, codes: frozenset[int], run: Run) -> Any:
        if isinstance(plain, tuple | list):
            return type(plain)(self._merge(a, b, codes, run) for a, b in zip(plain, other, strict=True))
        if not isinstance(plain, Tensor) or not plain.requires_grad:
            return plain
        given = [run.flags(w, self.program.path) for w in self.program.wheres]
        # a router gives [batch * token, expert]
        lead = merged_lead(tuple(plain.shape), given)
        flags = [expand_flags(flag, lead, self.program.path) for flag in given]
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
            if (weight := module._parameters[name]) is not None:
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


def run_without(
    module: nn.Module, call: Call, weights: dict[str, Tensor], edits: list[tuple[str, InputEdit]]
) -> Tensor:
    """Experts with some of their activations zeroed or detached; affine in the consumer weight, so the two are split.

    ``y = f(W without the cut) + [f*(W of the detached alone) - f*(0)]``, ``f*`` with all before the consumer detached.
    """
    args, kwargs = call
    boxes: dict[str, dict[str, list[Any]]] = {}
    for attribute, edit in edits:
        kinds = boxes.setdefault(attribute, {"zero": [], "detach": []})
        kinds[edit.kind] += [box_columns(box, edit.entries.shape) for box in edit.entries.boxes()]
    full = {name: weights.get(name, module._parameters[name]) for name in {*weights, *boxes}}
    cut = {name: without_entries(full[name], k["zero"] + k["detach"]) for name, k in boxes.items()}  # type: ignore[arg-type]
    with swapped(module, {**full, **cut}):  # type: ignore[dict-item]
        y = module.forward(*args, **kwargs)
    if any(kinds["detach"] for kinds in boxes.values()):
        first = first_tensor(call)
        call = replace_tensor(call, first, first.detach())
        others = {n: p.detach() for n, p in module._parameters.items() if p is not None and n not in boxes}
        only = {name: only_entries(full[name], k["detach"], k["zero"]) for name, k in boxes.items()}  # type: ignore[arg-type]
        with swapped(module, {**others, **only}):
            alone = module.forward(*call[0], **call[1])
        with swapped(module, {**others, **{name: torch.zeros_like(only[name]) for name in boxes}}):
            y = y + (alone - module.forward(*call[0], **call[1]))
    return y


def merged_lead(shape: tuple[int, ...], given: list[Tensor]) -> tuple[int, ...]:
    """The dimensions of an output that flags speak of: ``[batch]``, ``[batch, token]`` or ``[batch, head, token]``."""
    two = next((flag.shape for flag in given if flag.dim() == 2), None)
    if two is None or shape[0] == two.numel():
        return shape[:1]
    later = [d for d in range(2, len(shape)) if shape[d] == two[1]]
    return shape[:2] if shape[:2] == two or not later else shape[: later[0] + 1]


def refuse_caches(path: str, call: Call) -> None:
    for value in (*call[0], *call[1].values()):
        if type(value).__name__.endswith("Cache"):
            raise BatchError(
                f"{path} runs once per class of rows, which a key-value cache forbids: pass use_cache=False."
            )


def lead_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    return tuple(first_tensor((args, kwargs)).shape[:-1])


def first_tensor(call: Call) -> Tensor:
    return next(x for x in (*call[0], *call[1].values()) if isinstance(x, Tensor))


def replace_tensor(call: Call, old: Tensor, new: Tensor) -> Call:
    return tuple(new if x is old else x for x in call[0]), {k: new if x is old else x for k, x in call[1].items()}


def map_rows(call: Call, lead: tuple[int, ...], take: Callable[[Tensor], Tensor]) -> Call:
    """Every tensor argument with these leading dimensions, flattened to rows and cut."""

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or tuple(x.shape[: len(lead)]) != lead:
            return x
        return take(x.reshape(-1, *x.shape[len(lead) :]))

    return tuple(cut(x) for x in call[0]), {k: cut(x) for k, x in call[1].items()}
