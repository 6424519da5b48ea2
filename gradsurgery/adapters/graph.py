"""Routing inside a compiled graph: rows are masked there, not chosen, since shapes in a graph cannot follow labels.

Labels are tensors that the graph reads. A score that is still to be taken is asked for in the backward, by an operator
that the graph keeps whole: other labels and other scores compile nothing anew.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Asked(Protocol):
    """What knows, by the time of a backward, which rows teach the kept part."""

    def taught(self, path: str, lead: tuple[int, ...]) -> Tensor:
        """The rows of the layer at ``path`` that teach, bool ``lead``."""
        ...


_numbers = itertools.count()
_asked: weakref.WeakValueDictionary[int, Asked] = weakref.WeakValueDictionary()


def ticket(asked: Asked) -> Tensor:
    """A number by which a graph asks for the rows, as a tensor: a graph would be compiled anew for another integer."""
    number = next(_numbers)
    _asked[number] = asked
    return torch.tensor(number)


@torch.library.custom_op("gradsurgery::taught_rows", mutates_args=())
def taught_rows(dy_NO: Tensor, ticket: Tensor, path: str, lead: Sequence[int]) -> Tensor:
    """Bool ``[N]``: the rows that teach; reads ``dy`` in order to run in the backward, where they are known."""
    return _asked[int(ticket)].taught(path, tuple(lead)).reshape(-1).to(dy_NO.device, copy=True)


@taught_rows.register_fake
def _(dy_NO: Tensor, ticket: Tensor, path: str, lead: Sequence[int]) -> Tensor:
    return dy_NO.new_empty(dy_NO.shape[0], dtype=torch.bool)


class _Masked(torch.autograd.Function):
    """``y = x Wᵀ`` or ``x ⊙ g``; the weight's gradient sums over the rows that teach.

    ``rows`` are these rows, bool ``[N]``, or the ticket that gives them in the backward. Both factors of a product are
    filled: what other rows hold, inf and nan included, cannot change it.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Tensor, rows: Tensor, path: str | None, lead: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_NI, weight, rows)
        ctx.path, ctx.lead = path, lead
        return x_NI * weight if weight.dim() == 1 else x_NI @ weight.T

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor):  # type: ignore[no-untyped-def, override]
        x_NI, weight, rows = ctx.saved_tensors
        gains = weight.dim() == 1
        dx = dy_NO * weight if gains else dy_NO @ weight
        if ctx.path is not None:
            rows = torch.ops.gradsurgery.taught_rows(dy_NO, rows, ctx.path, ctx.lead)
        others = ~rows[:, None]
        dy_NO, x_NI = dy_NO.masked_fill(others, 0.0), x_NI.masked_fill(others, 0.0)
        dw = (dy_NO * x_NI).sum(0) if gains else dy_NO.T @ x_NI
        return dx, dw, None, None, None


def learned(x_NI: Tensor, weight: Tensor, rows_N: Tensor) -> Tensor:
    """A weight's output, its gradient from the rows (bool ``[N]``) alone."""
    out: Tensor = _Masked.apply(x_NI, weight, rows_N, None, None)  # type: ignore[no-untyped-call]
    return out


def learned_later(x_NI: Tensor, weight: Tensor, ticket: Tensor, path: str, lead: tuple[int, ...]) -> Tensor:
    """The same, where a ticket gives the rows in the backward."""
    out: Tensor = _Masked.apply(x_NI, weight, ticket, path, lead)  # type: ignore[no-untyped-call]
    return out
