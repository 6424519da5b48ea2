"""Models as people write them without transformers: language models and MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIZE, HIDDEN, VOCABULARY = 20, 4, 5, 28, 37
"""Model width, heads of ``SIZE`` dimensions, MLP neurons, tokens."""


class SelfAttention(nn.Module):
    """Causal attention with fused query, key and value rows, as in nanoGPT."""

    def __init__(self, flash: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.flash = nn.Dropout(dropout), flash
        self.seen: Tensor
        self.register_buffer("seen", torch.ones(64, 64).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, HEADS, SIZE).transpose(1, 2) for part in self.qkv(x).split(c, dim=2))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * SIZE**-0.5
            scores = scores.masked_fill(~self.seen[:t, :t], float("-inf"))
            y = self.drop(scores.softmax(-1)) @ v
        return self.drop(self.out(y.transpose(1, 2).reshape(b, t, c)))


class GroupedAttention(nn.Module):
    """Four query heads on two key and value heads, as plain code."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, 2 * SIZE), nn.Linear(WIDTH, 2 * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, SIZE).transpose(1, 2)
        k, v = (f(x).view(b, t, 2, SIZE).transpose(1, 2).repeat_interleave(2, dim=1) for f in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class EinsumAttention(nn.Module):
    """Weights with an axis of their own for heads, as in JAX code."""

    def __init__(self) -> None:
        super().__init__()
        shape = WIDTH, HEADS, SIZE
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.randn(shape) * 0.2) for _ in range(3))
        self.w_o = nn.Parameter(torch.randn(HEADS, SIZE, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (self.w_q, self.w_k, self.w_v))
        weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        return torch.einsum("bthd,hdc->btc", torch.einsum("bhts,bshd->bthd", weights, v), self.w_o)


class StockAttention(nn.Module):
    """``nn.MultiheadAttention``; with ``kdim``, in its form with three weights instead of one."""

    def __init__(self, separate: bool = False) -> None:
        super().__init__()
        kdim = 12 if separate else None
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, kdim=kdim, vdim=kdim, batch_first=True)
        self.shrink = nn.Linear(WIDTH, 12) if separate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        memory = self.shrink(x)
        return self.attn(x, memory, memory, need_weights=False)[0]


class MLP(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(x))))


class PackedGate(nn.Module):
    """Gate and up rows interleaved in one raw parameter that is used as ``x @ w``."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(WIDTH, 2 * HIDDEN) * 0.2)
        self.w_out = nn.Parameter(torch.randn(HIDDEN, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        both = x @ self.w_in
        return (F.silu(both[..., ::2]) * both[..., 1::2]) @ self.w_out


class DenseExperts(nn.Module):
    """Every expert computes; the router weighs them."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, 7) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, 7, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btc,ecf->btef", x, self.up).relu()
        return torch.einsum("btef,efc,bte->btc", hidden, self.down, self.router(x).softmax(-1))


class NamedExperts(nn.Module):
    """Top-2 routing over experts that are modules of a ``ModuleDict``."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleDict({f"expert_{i}": MLP() for i in range(experts)})

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts.values()):
            out = out + expert(x) * (weight * (chosen == i)).sum(-1, keepdim=True)
        return out


class Block(nn.Module):
    """Pre-norm attention and MLP around a residual stream."""

    def __init__(self, attention: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), attention or SelfAttention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), mlp or MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens, learned positions and some blocks, which a subclass may hold in another way."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.hold(*blocks)

    def hold(self, *blocks: nn.Module) -> None:
        self.blocks = nn.ModuleList(blocks)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.body(x)))


class GPTOfAttributes(GPT):
    def hold(self, *blocks: nn.Module) -> None:
        self.block1, self.block2 = blocks

    def body(self, x: Tensor) -> Tensor:
        return self.block2(self.block1(x))


class GPTOfSequential(GPT):
    def hold(self, *blocks: nn.Module) -> None:
        self.layers = nn.Sequential(*blocks)

    def body(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Looped(GPT):
    """One block applied three times."""

    def hold(self, *blocks: nn.Module) -> None:
        (self.block,) = blocks

    def body(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class Encoder(nn.Module):
    """torch's own encoder."""

    def __init__(self, **options: bool | str) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.1, batch_first=True, **options)  # type: ignore[arg-type]
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(ids)))


class Translator(nn.Module):
    """torch's own encoder and decoder, with cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.pair = nn.Transformer(WIDTH, HEADS, 2, 2, HIDDEN, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.pair(self.tokens(source), self.tokens(target)))


class Recurrent(nn.Module):
    """A recurrent language model."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.tokens, self.rnn = nn.Embedding(VOCABULARY, WIDTH), kind(WIDTH, 12, batch_first=True)
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.tokens(ids))[0])


class Perceptron(nn.Module):
    """``up`` and ``down`` around a nonlinearity, as whatever the subclass says a product is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 11)), nn.Parameter(torch.randn(11, 4))

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def forward(self, x: Tensor) -> Tensor:
        return self.product(torch.tanh(self.product(x, self.up)), self.down)
