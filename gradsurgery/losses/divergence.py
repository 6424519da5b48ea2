"""KL divergence of two tensors of logits, and its gradient, block by block: operators for autograd and compilation.

With a = (x - max x) / temperature, s = Σ exp a and q = exp(a) / s of the current logits x, and b, t and p of the
reference's: KL(p ‖ q) = Σ p (b - a) - log t + log s, with gradient (q - p) / temperature with respect to x;
KL(q ‖ p) = Σ q (a - b) - log s + log t, with gradient q (log q - log p - KL) / temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import PlanError
from gradsurgery.losses.blocks import Blocks, matrices


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """Double precision stays; all else is computed in fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _shifted(x: Tensor, top: Tensor, temperature: float, out: Tensor) -> Tensor:
    torch.sub(x, top, out=out)
    return out.div_(temperature) if temperature != 1.0 else out


@torch.library.custom_op("gradsurgery::kl_divergence", mutates_args=())
def kl_op(
    current: Tensor,
    reference: Tensor,
    counted: Tensor,
    temperature: float,
    reverse: bool,
    chunk_size: int,
    once: bool = False,
) -> tuple[Tensor, Tensor]:
    """KL by row, ``[…]``, and the rows' statistics ``[…, 4]``: both maxima and both logarithms of sums.

    Rows that do not count give 0, whatever they hold. With ``once`` the first backward lets go of the reference, also
    one that keeps the graph.
    """
    dtype = work_dtype(current, reference)
    kl = torch.zeros(current.shape[:-1], dtype=dtype, device=current.device)
    stats = torch.zeros((*kl.shape, 4), dtype=dtype, device=current.device)
    blocks = Blocks(current, dtype, chunk_size, buffers=3)
    for x_NV, y_NV, counted_N1, kl_N1, stats_N4 in matrices(
        current, reference, counted.unsqueeze(-1), kl.unsqueeze(-1), stats
    ):
        for block in blocks.of(counted_N1):
            if not block.some:
                continue
            x, y = x_NV[block.rows], y_NV[block.rows]
            top_x, top_y = x.amax(-1, keepdim=True).to(dtype), y.amax(-1, keepdim=True).to(dtype)
            s, t, weighted = torch.zeros_like(top_x), torch.zeros_like(top_x), torch.zeros_like(top_x)
            for columns in blocks.columns():
                a, b, d = blocks.buffers(x[:, columns])
                _shifted(x[:, columns], top_x, temperature, a)
                _shifted(y[:, columns], top_y, temperature, b)
                torch.sub(b, a, out=d)
                s += a.exp_().sum(-1, keepdim=True)
                t += b.exp_().sum(-1, keepdim=True)
                # 0 * inf, where both forbid a word, is nan and counts for nothing
                weighted += d.mul_(a if reverse else b).nansum(-1, keepdim=True)
            log_s, log_t = s.log(), t.log()
            value = log_t - log_s - weighted / s if reverse else log_s - log_t + weighted / t
            uncounted = ~counted_N1[block.rows]
            kl_N1[block.rows] = value.masked_fill_(uncounted, 0.0)
            stats_N4[block.rows] = torch.cat([top_x, top_y, log_s, log_t], -1).masked_fill_(uncounted, 0.0)
    return kl, stats


@kl_op.register_fake
def _(current: Tensor, reference: Tensor, *rest: Any) -> Any:
    dtype = work_dtype(current, reference)
    rows = current.shape[:-1]
    return current.new_empty(rows, dtype=dtype), current.new_empty((*rows, 4), dtype=dtype)


@torch.library.custom_op("gradsurgery::kl_divergence_backward", mutates_args=())
def kl_backward_op(
    grad: Tensor,
    current: Tensor,
    reference: Tensor,
    counted: Tensor,
    kl: Tensor,
    stats: Tensor,
    temperature: float,
    reverse: bool,
    chunk_size: int,
) -> Tensor:
    """Gradient with respect to ``current``, of its dtype; exactly 0 in rows that do not count."""
    out = torch.empty_like(current, memory_format=torch.contiguous_format)
    in_place = kl.dtype == current.dtype
    blocks = Blocks(current, kl.dtype, chunk_size, buffers=1 if in_place else 2)
    columned = (x.unsqueeze(-1) for x in (counted, kl, grad))
    for x_NV, y_NV, out_NV, counted_N1, kl_N1, grad_N1, stats_N4 in matrices(current, reference, out, *columned, stats):
        for block in blocks.of(counted_N1):
            if not block.some:
                out_NV[block.rows] = 0.0
                continue
            top_x, top_y, log_s, log_t = stats_N4[block.rows].split(1, -1)
            g = grad_N1[block.rows] / temperature
            over_s, over_t = g * torch.exp(-log_s), g * torch.exp(-log_t)
            shift = log_t - log_s - kl_N1[block.rows]
            for columns in blocks.columns():
                x, y, part = (z_NV[block.rows, columns] for z_NV in (x_NV, y_NV, out_NV))
                *first, b = blocks.buffers(x)
                a = part if in_place else first[0]
                _shifted(x, top_x, temperature, a)
                _shifted(y, top_y, temperature, b)
                if reverse:
                    torch.sub(a, b, out=b).add_(shift)
                    b.mul_(a.exp_().mul_(over_s)).masked_fill_(a == 0, 0.0)
                    part.copy_(b)
                else:
                    torch.sub(a.exp_().mul_(over_s), b.exp_().mul_(over_t), out=part)
                if not block.all:
                    part.masked_fill_(~counted_N1[block.rows], 0.0)
    return out


@kl_backward_op.register_fake
def _(grad: Tensor, current: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(current, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    current, reference, counted, *options, once = inputs
    ctx.held = [reference] if once else []
    ctx.save_for_backward(current, counted, *output, *([] if once else [reference]))
    ctx.once = once
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    current, counted, kl, stats, *reference = ctx.saved_tensors
    if ctx.once and not ctx.held:
        raise PlanError(
            "kl_divergence: the reference of this pass went with its first backward. A loss that runs several says so: "
            "loss.backwards = 2."
        )
    reference = ctx.held.pop() if ctx.once else reference[0]
    return kl_backward_op(grad, current, reference, counted, kl, stats, *ctx.options), *(None,) * 6


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise PlanError(
        "kl_divergence has no second derivative: it keeps no softmax to differentiate again. Call backward without "
        "create_graph=True, or write the divergence with torch.nn.functional.kl_div."
    )


torch.library.register_autograd("gradsurgery::kl_divergence", _backward, setup_context=_setup)
torch.library.register_autograd("gradsurgery::kl_divergence_backward", refuse_second_derivative)
