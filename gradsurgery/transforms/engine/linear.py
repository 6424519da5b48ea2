"""Linear layers that do not compute what is masked: plain tensor kernels on rows ``[N, features]``.

The gradient of a weight atom sums over the rows that count for it alone, so what a forget batch masks is never
multiplied. Zeroed input features also are atoms of the weight (factor 0), so the input is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from gradsurgery.tensors import Indices
from gradsurgery.transforms.engine.program import Atom, InputEdit, box_columns
from gradsurgery.transforms.engine.rows import RowClasses, Rows


class Edits:
    """The input edits of one linear layer, with their features as columns."""

    def __init__(self, edits: Iterable[InputEdit], input_dim: int) -> None:
        self.zero: list[tuple[Indices, int]] = []
        self.detach: list[tuple[Indices, int]] = []
        for edit in edits:
            target = self.zero if edit.kind == "zero" else self.detach
            target.append((feature_columns(edit, input_dim), edit.column))


def feature_columns(edit: InputEdit, input_dim: int) -> Indices:
    """The input features that the consumer entries of an edit read."""
    bits = 0
    for box in edit.entries.boxes():
        bits |= box[input_dim]
    return box_columns((bits,), (edit.entries.shape[input_dim],))[0]


def flagged(classes: RowClasses, column: int) -> Rows:
    return classes.rows(lambda code: column < 0 or bool(code >> column & 1))


def output(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, edits: Edits, classes: RowClasses) -> Tensor:
    """``x W^T + b`` with the zeroed features of flagged rows at zero; ``x_NI`` itself is not changed."""
    active = [(columns, flagged(classes, column)) for columns, column in edits.zero]
    active = [(columns, rows) for columns, rows in active if not rows.none]
    if not active:
        return F.linear(x_NI, weight_OI, bias_O)
    columns, rows = active[0]
    kept = _other_end(columns)
    cut_NC = columns.take(x_NI, 1)
    if len(active) == 1 and kept is not None:
        y_NO = F.linear(x_NI[:, kept], weight_OI[:, kept], bias_O)
    elif len(active) == 1 and x_NI.device.type == "cpu" and bool(torch.isfinite(cut_NC).all()):
        # a weight without the columns is a smaller copy than x without them; 0 * inf would be nan, hence the check
        y_NO = F.linear(x_NI, _without(weight_OI, columns), bias_O)
    else:
        x_NI = classes.scratch(x_NI)
        for columns, rows in active:
            rows.fill_(x_NI, columns, 0.0)
        return F.linear(x_NI, weight_OI, bias_O)
    if not rows.all:  # the cut features of the other rows: a narrow product instead of a copy of x
        cut_NC = cut_NC.clone()
        Rows(rows.count, rows.span, rows.index).fill_(cut_NC, Indices(torch.arange(len(columns)), len(columns)), 0.0)
        y_NO.addmm_(cut_NC, columns.take(weight_OI, 1).T)
    return y_NO


def _without(weight_OI: Tensor, columns: Indices) -> Tensor:
    out = weight_OI.clone(memory_format=torch.preserve_format)
    return out.index_fill_(1, columns.index_on(out.device), 0.0)


def _other_end(columns: Indices) -> slice | None:
    """The features that stay where ``columns`` cut off one end."""
    if columns.span is None or columns.whole:
        return None
    start, stop = columns.span
    return slice(stop, columns.size) if start == 0 else slice(0, start) if stop == columns.size else None


def input_gradient(dy_NO: Tensor, weight_OI: Tensor, edits: Edits, classes: RowClasses) -> Tensor:
    """``dy W`` without the features that are zeroed or detached."""
    cuts = [(columns, flagged(classes, column)) for columns, column in (*edits.zero, *edits.detach)]
    for columns, rows in cuts:
        kept = _other_end(columns) if rows.all else None
        if kept is not None:
            out = dy_NO.new_empty(dy_NO.shape[0], weight_OI.shape[1])
            columns.narrow(out, 1).zero_()
            torch.mm(dy_NO, weight_OI[:, kept], out=out[:, kept])
            break
    else:
        out = dy_NO @ weight_OI
    for columns, rows in cuts:
        rows.fill_(out, columns, 0.0)
    return out


class _Taken:
    """Rows taken from the same two tensors, once each."""

    def __init__(self, left_NA: Tensor, right_NB: Tensor) -> None:
        self.left_NA, self.right_NB = left_NA, right_NB
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if id(rows) not in self.cache:
            self.cache[id(rows)] = (rows.take(self.left_NA), rows.take(self.right_NB))
        return self.cache[id(rows)]


def weight_gradient(left_NA: Tensor, right_NB: Tensor, atoms: list[Atom], classes: RowClasses, passes: int) -> Tensor:
    """``sum_n f(n) left_n right_n^T`` per atom, ``f`` the atom's factor for the row's class.

    Left and right are ``dy`` and ``x`` for a weight ``[out, in]``, ``x`` and ``dy`` for one stored ``[in, out]``.
    Masked parts are not computed.
    """
    out = left_NA.new_empty(left_NA.shape[1], right_NB.shape[1])
    taken = _Taken(left_NA, right_NB)
    weights = {id(atom): _factor_rows(atom, classes, passes) for atom in atoms}
    alike = len({tuple((factor, id(rows)) for factor, rows in parts) for parts in weights.values()}) == 1
    base = atoms[0] if alike or not _all_spans(atoms[0]) else None
    if base is not None:
        _add_products(out, base.tensor_box, weights[id(base)], taken, fresh=True)
    for atom in atoms:
        if alike or atom is base:
            continue
        correction = None if base is None else _correction(atom, base, classes, passes)
        for box in atom.boxes:
            if correction is None:
                _add_products(out, box, weights[id(atom)], taken, fresh=True)
            else:
                _add_products(out, box, correction, taken, fresh=False)
    return out


def bias_gradient(dy_NO: Tensor, atoms: list[Atom], classes: RowClasses, passes: int) -> Tensor:
    """``sum_n f(n) dy_n`` per atom of the bias."""
    out = dy_NO.new_zeros(dy_NO.shape[1])
    sums: dict[int, Tensor] = {}
    for atom in atoms:
        for factor, rows in _factor_rows(atom, classes, passes):
            if id(rows) not in sums:
                sums[id(rows)] = rows.take(dy_NO).sum(0)
            for (columns,) in atom.boxes:
                out[columns.index_on(out.device)] += columns.take(sums[id(rows)], 0) * factor
    return out


def _all_spans(atom: Atom) -> bool:
    return all(columns.span is not None for box in atom.boxes for columns in box)


def _factor_rows(atom: Atom, classes: RowClasses, passes: int) -> list[tuple[float, Rows]]:
    """The rows that count for an atom, by what they count."""
    by_factor: dict[float, list[int]] = {}
    for code in classes.codes:
        if factor := atom.factor(code, passes):
            by_factor.setdefault(factor, []).append(code)
    return [(f, classes.rows(frozenset(codes).__contains__)) for f, codes in by_factor.items()]


def _correction(atom: Atom, base: Atom, classes: RowClasses, passes: int) -> list[tuple[float, Rows]] | None:
    """What to add to the base's gradient on this atom; None where only a subtraction would do (never exact)."""
    by_factor: dict[float, list[int]] = {}
    for code in classes.codes:
        mine, given = atom.factor(code, passes), base.factor(code, passes)
        if mine != given:
            if given != 0.0:
                return None
            by_factor.setdefault(mine, []).append(code)
    return [(f, classes.rows(frozenset(codes).__contains__)) for f, codes in by_factor.items()]


def _add_products(
    out: Tensor, box: tuple[Indices, ...], parts: list[tuple[float, Rows]], taken: _Taken, fresh: bool
) -> None:
    """``out[box] (+)= sum of factor * left[rows]^T right[rows]``; ``fresh`` overwrites what the box holds."""
    a, b = box
    if a.span is not None and b.span is not None:
        view = b.narrow(a.narrow(out, 0), 1)
        for k, (factor, rows) in enumerate(parts):
            left, right = taken(rows)
            view.addmm_(a.take(left, 1).T, b.take(right, 1), beta=0.0 if fresh and k == 0 else 1.0, alpha=factor)
        if fresh and not parts:
            view.zero_()
        return
    total = None
    for factor, rows in parts:
        left, right = taken(rows)
        product = torch.mm(a.take(left, 1).T, b.take(right, 1))
        product = product if factor == 1.0 else product.mul_(factor)
        total = product if total is None else total.add_(product)
    if total is None:
        if fresh:
            Rows(a.size, a.span, a.index_on(out.device)).fill_(out, b, 0.0)
    elif a.whole or b.whole:
        dim, columns = (1, b) if a.whole else (0, a)
        index = columns.index_on(out.device)
        _ = out.index_copy_(dim, index, total) if fresh else out.index_add_(dim, index, total)
    else:
        at = (a.index_on(out.device)[:, None], b.index_on(out.device)[None])
        out[at] = total if fresh else out[at] + total
