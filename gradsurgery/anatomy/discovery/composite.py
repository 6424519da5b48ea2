"""Functions of torch that are made of others: seen through, so that the products inside them are noted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

COMPOSITE = (F.multi_head_attention_forward,)
"""Dispatched whole: inside of them a function mode is off unless it is turned on again."""


@contextlib.contextmanager
def seen_through(mode: TorchFunctionMode) -> Iterator[None]:
    """Run a composite function's own code, with the mode on for what it calls."""
    with mock.patch.object(F, "has_torch_function", lambda _: False), mode:
        yield


def written_out(
    call: Callable[[Callable, tuple, dict], Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Scaled dot-product attention as its two products, for queries, keys or values that are weights."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = call(torch.matmul, (query, key.transpose(-2, -1)), {}) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return call(torch.matmul, (call(torch.softmax, (scores, -1), {}), value), {})


def opaque(outputs: Iterable[Tensor], tensors: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that reach ``outputs`` through an autograd function of somebody's own."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    found: set[str] = set()
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(x.grad_fn, False) for x in outputs]
    while stack:
        node, inside = stack.pop()
        if node is None or (node, inside) in seen:
            continue
        seen.add((node, inside))
        if inside and hasattr(node, "variable"):
            found.add(names.get(id(node.variable), ""))
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        views = inside and node.name().startswith(_VIEWS)
        stack.extend((child, own or views) for child, _ in node.next_functions)
    return found - {""}


_VIEWS = ("T", "View", "Transpose", "Permute", "Select", "Slice", "Reshape", "UnsafeView", "Alias", "Split")


def folded(call: Callable[[Callable, tuple, dict], Any], equation: str, operands: tuple) -> Any:
    """An einsum of many operands as products of two, from the left: ``abc,cd,ab->d`` is ``(abc,cd->abd),ab->d``."""
    terms, result = equation.replace(" ", "").split("->")
    letters = terms.split(",")
    left, value = letters[0], operands[0]
    for place in range(1, len(operands)):
        needed = set("".join(letters[place + 1 :]) + result)
        last = place == len(operands) - 1
        kept = result if last else "".join(c for c in dict.fromkeys(left + letters[place]) if c in needed)
        value = call(torch.einsum, (f"{left},{letters[place]}->{kept}", value, operands[place]), {})
        left = kept
    return value
