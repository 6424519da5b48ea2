"""A distribution by its k likeliest words and the mass of the rest: k + 1 outcomes instead of a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import BatchError
from gradsurgery.losses.blocks import Blocks, matrices
from gradsurgery.losses.divergence import refuse_second_derivative, work_dtype


@dataclass(frozen=True, eq=False)
class TopK:
    """Log-probabilities of the ``k`` likeliest words of every position, and of all other words together.

    Divergences between distributions over these k + 1 outcomes never exceed those over the vocabulary (merging
    outcomes loses information: the data-processing inequality), and equal them where the ratio of the two
    probabilities is the same for all words of the rest.

    Attributes:
        log_probs: ``[batch, token, k]``.
        indices: The words, int ``[batch, token, k]``, all different.
        rest: Log of the mass of the other words, ``[batch, token]``.
        vocabulary: Size of the vocabulary.
        temperature: What the logits were divided by.

    Example:
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
        >>> gs.losses.TopK.of(logits, k=2).indices.tolist()
        [[[0, 1]]]
    """

    log_probs: Tensor
    indices: Tensor
    rest: Tensor
    vocabulary: int
    temperature: float = 1.0

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
        """The ``k`` likeliest words of logits ``[batch, token, vocabulary]``."""
        if not 0 < k < logits.shape[-1]:
            raise BatchError(f"top {k} of {logits.shape[-1]} words leaves no rest; k is at least 1 and below that.")
        indices = logits.topk(k, -1).indices
        counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        log_probs = torch.ops.gradsurgery.top_log_softmax(logits.detach(), indices, counted, temperature, 0)[0]
        return cls(log_probs[..., :-1], indices, log_probs[..., -1], logits.shape[-1], temperature)

    def outcomes(self, dtype: torch.dtype) -> Tensor:
        """Log-probabilities of all k + 1 outcomes, renormalised (a half-precision store rounds them)."""
        return torch.cat([self.log_probs.to(dtype), self.rest.to(dtype).unsqueeze(-1)], -1).log_softmax(-1)

    def to(self, device: torch.device) -> TopK:
        indices = self.indices.to(device, torch.int64)
        return TopK(self.log_probs.to(device), indices, self.rest.to(device), self.vocabulary, self.temperature)


@torch.library.custom_op("gradsurgery::top_log_softmax", mutates_args=())
def top_op(
    logits: Tensor, indices: Tensor, counted: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the indexed words and of the rest, ``[…, k + 1]``, and statistics ``[…, 3]``.

    The statistics are the row's maximum and, relative to it, the log-sum-exps of all words and of the rest, which is
    summed by itself: one minus the others would cancel where they have nearly all the mass.
    """
    dtype = work_dtype(logits)
    out = torch.zeros((*indices.shape[:-1], indices.shape[-1] + 1), dtype=dtype, device=logits.device)
    stats = torch.zeros((*indices.shape[:-1], 3), dtype=dtype, device=logits.device)
    blocks = Blocks(logits, dtype, chunk_size, buffers=1, whole_rows=True)
    for x_NV, indices_NK, counted_N1, out_NK, stats_N3 in matrices(logits, indices, counted.unsqueeze(-1), out, stats):
        for block in blocks.of(counted_N1):
            if not block.some:
                continue
            x, chosen = x_NV[block.rows], indices_NK[block.rows]
            top = x.amax(-1, keepdim=True).to(dtype)
            (a,) = blocks.buffers(x)
            torch.sub(x, top, out=a).div_(temperature)
            at_chosen = a.gather(-1, chosen)
            a.scatter_(-1, chosen, -torch.inf)
            most = a.amax(-1, keepdim=True).nan_to_num(nan=torch.nan, neginf=0.0)
            rest = a.sub_(most).exp_().sum(-1, keepdim=True).log() + most
            every = torch.logaddexp(at_chosen.logsumexp(-1, keepdim=True), rest)
            uncounted = ~counted_N1[block.rows]
            out_NK[block.rows] = (torch.cat([at_chosen, rest], -1) - every).masked_fill_(uncounted, 0.0)
            stats_N3[block.rows] = torch.cat([top, every, rest], -1).masked_fill_(uncounted, 0.0)
    return out, stats


@top_op.register_fake
def _(logits: Tensor, indices: Tensor, counted: Tensor, temperature: float, chunk_size: int) -> Any:
    rows, dtype = indices.shape[:-1], work_dtype(logits)
    return logits.new_empty((*rows, indices.shape[-1] + 1), dtype=dtype), logits.new_empty((*rows, 3), dtype=dtype)


@torch.library.custom_op("gradsurgery::top_log_softmax_backward", mutates_args=())
def top_backward_op(
    grad: Tensor,
    logits: Tensor,
    indices: Tensor,
    counted: Tensor,
    log_probs: Tensor,
    stats: Tensor,
    temperature: float,
    chunk_size: int,
) -> Tensor:
    """Gradient by logit: ``g_j - q_j Σ g`` at an indexed word, ``q_j (g_rest / q_rest - Σ g)`` at any other."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    blocks = Blocks(logits, log_probs.dtype, chunk_size, buffers=2, whole_rows=True)
    for x_NV, indices_NK, counted_N1, out_NV, log_probs_NK, grad_NK, stats_N3 in matrices(
        logits, indices, counted.unsqueeze(-1), out, log_probs, grad, stats
    ):
        for block in blocks.of(counted_N1):
            part = out_NV[block.rows]
            if not block.some:
                part.zero_()
                continue
            x, chosen = x_NV[block.rows], indices_NK[block.rows]
            top, every, rest = stats_N3[block.rows].split(1, -1)
            g = grad_NK[block.rows] / temperature
            total = g.sum(-1, keepdim=True)
            a, b = blocks.buffers(x)
            torch.sub(x, top, out=a).div_(temperature)
            torch.sub(a, rest.nan_to_num(nan=torch.nan, neginf=0.0), out=b).exp_().mul_(g[:, -1:])
            b.sub_(a.sub_(every).exp_().mul_(total))
            at_chosen = log_probs_NK[block.rows, :-1].exp()
            b.scatter_(-1, chosen, g[:, :-1] - at_chosen * total)
            part.copy_(b)
            if not block.all:
                part.masked_fill_(~counted_N1[block.rows], 0.0)
    return out


@top_backward_op.register_fake
def _(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, indices, counted, *options = inputs
    ctx.save_for_backward(logits, indices, counted, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return top_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


torch.library.register_autograd("gradsurgery::top_log_softmax", _backward, setup_context=_setup)
torch.library.register_autograd("gradsurgery::top_log_softmax_backward", refuse_second_derivative)
