"""Cross-entropy of logits, block by block: an operator that keeps the logits and one number a row, no second softmax.

With s = Σ exp(x - max x): -log softmax(x)[t] = log s + max x - x[t], with gradient softmax(x) - onehot(t).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsurgery.losses.blocks import Blocks, matrices
from gradsurgery.losses.divergence import work_dtype

IGNORED = -100


@torch.library.custom_op("gradsurgery::cross_entropy", mutates_args=())
def cross_entropy_op(logits: Tensor, targets: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Sum over the rows whose target is not `IGNORED`, and every row's log-sum-exp ``[…]``; in fp32, or fp64."""
    dtype = work_dtype(logits)
    lse = torch.zeros(targets.shape, dtype=dtype, device=logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    blocks = Blocks(logits, dtype, chunk_size, buffers=1)
    for x_NV, t_N1, lse_N1 in matrices(logits, targets.unsqueeze(-1), lse.unsqueeze(-1)):
        counted_N1 = t_N1 != IGNORED
        for block in blocks.of(counted_N1):
            if not block.some:
                continue
            x, uncounted = x_NV[block.rows], ~counted_N1[block.rows]
            top = x.amax(-1, keepdim=True).to(dtype)
            s = torch.zeros_like(top)
            for columns in blocks.columns():
                (a,) = blocks.buffers(x[:, columns])
                s += torch.sub(x[:, columns], top, out=a).exp_().sum(-1, keepdim=True)
            value = s.log_().add_(top)
            lse_N1[block.rows] = value.masked_fill(uncounted, 0.0)
            picked = x.gather(1, t_N1[block.rows].masked_fill(uncounted, 0)).to(dtype)
            total += (value - picked).masked_fill_(uncounted, 0.0).sum(dtype=torch.float64)
    return total.to(dtype), lse


@cross_entropy_op.register_fake
def _(logits: Tensor, targets: Tensor, chunk_size: int) -> Any:
    dtype = work_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty(targets.shape, dtype=dtype)


@torch.library.custom_op("gradsurgery::cross_entropy_backward", mutates_args=())
def cross_entropy_backward_op(grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, chunk_size: int) -> Tensor:
    """Gradient with respect to ``logits``, of its dtype; exactly 0 in rows that do not count."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    in_place = lse.dtype == logits.dtype
    blocks = Blocks(logits, lse.dtype, chunk_size, buffers=0 if in_place else 1)
    for x_NV, out_NV, t_N1, lse_N1 in matrices(logits, out, targets.unsqueeze(-1), lse.unsqueeze(-1)):
        counted_N1 = t_N1 != IGNORED
        for block in blocks.of(counted_N1):
            part, uncounted = out_NV[block.rows], ~counted_N1[block.rows]
            if not block.some:
                part.zero_()
                continue
            for columns in blocks.columns():
                a = part[:, columns] if in_place else blocks.buffers(part[:, columns])[0]
                torch.sub(x_NV[block.rows, columns], lse_N1[block.rows], out=a)
                torch.mul(a.exp_(), grad, out=part[:, columns])
            at = t_N1[block.rows].masked_fill(uncounted, 0)
            picked = x_NV[block.rows].gather(1, at).to(lse.dtype).sub_(lse_N1[block.rows])
            part.scatter_(1, at, picked.expm1_().mul_(grad).to(part.dtype))  # rounded once, as all others
            if not block.all:
                part.masked_fill_(uncounted, 0.0)
    return out


@cross_entropy_backward_op.register_fake
def _(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.chunk_size = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    return cross_entropy_backward_op(grad, *ctx.saved_tensors, ctx.chunk_size), None, None


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, logits, targets, lse, _ = inputs
    ctx.save_for_backward(grad, logits, targets, lse)


def _backward_twice(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives, which are rare, in plain operations."""
    grad, logits, targets, lse = ctx.saved_tensors
    counted = (targets != IGNORED).unsqueeze(-1)
    p = torch.exp(logits.to(lse.dtype) - lse.unsqueeze(-1)).masked_fill(~counted, 0.0)
    v = given.to(lse.dtype).masked_fill(~counted, 0.0)
    picked = v.gather(-1, targets.clamp(min=0).unsqueeze(-1))
    mean = (p * v).sum(-1, keepdim=True)
    return (mean - picked).sum(), (grad * p * (v - mean)).to(logits.dtype), None, None, None


torch.library.register_autograd("gradsurgery::cross_entropy", _backward, setup_context=_setup)
torch.library.register_autograd("gradsurgery::cross_entropy_backward", _backward_twice, setup_context=_setup_twice)
