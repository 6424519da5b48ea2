"""Token mixers and routers with a corner of their own: decaying states, learned queries, tables of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.anatomy.custom import HEADS, SIZE, VOCABULARY, WIDTH


class Decay(nn.Module):
    """Linear attention whose states decay, in one head so fast that almost nothing of them is left.

    Future scores are masked after the exponential, which has overflowed there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.a, self.out = nn.Linear(WIDTH, HEADS, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.a_log = nn.Parameter(torch.tensor([0.0, 4.3, 1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, HEADS, SIZE).transpose(1, 2) for f in (self.q, self.k, self.v))
        total = (-self.a_log.exp() * F.softplus(self.a(x) + 1)).cumsum(1).transpose(1, 2)
        decay = (total[..., :, None] - total[..., None, :]).exp()
        scores = torch.where(torch.ones(t, t).tril().bool(), (q @ k.mT) * decay, torch.zeros((), dtype=x.dtype))
        return self.out((scores @ v).transpose(1, 2).reshape(b, t, c))


class Pooled(nn.Module):
    """Attention of learned queries to the tokens before, written as one call."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, WIDTH))
        self.mix = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        before = torch.stack([x, x.roll(1, 1), x.roll(2, 1)], dim=2)
        read = F.scaled_dot_product_attention(self.queries.expand(*x.shape[:2], -1, -1), before, before)
        return self.mix(read.flatten(2))


class OneKey(nn.Module):
    """Heads on one key, and a convolution along the tokens that mixes the channels of each query and of the key."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * SIZE, bias=False) for n in (HEADS, 1, 1))
        width = (HEADS + 1) * SIZE
        self.depthwise = nn.Conv1d(width, width, 2, groups=width)
        self.mixing = nn.Conv1d(width, width, 2, groups=HEADS + 1)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        plain = torch.cat([self.q(x), self.k(x)], dim=-1)
        mixed = self.mixing(self.depthwise(F.pad(plain.mT, (2, 0)))).mT
        q, k = (mixed + plain).split([WIDTH, SIZE], dim=-1)
        k = k + q.view(b, t, HEADS, SIZE).mean(2)
        q = q.view(b, t, HEADS, SIZE).transpose(1, 2)
        k, v = (z[:, None].expand_as(q) for z in (k, self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class LinearAttention(nn.Module):
    """MobileViTv2's: one channel of scores over the places, whose bias the softmax ignores, for keys and values."""

    def __init__(self, width: int = 100) -> None:
        super().__init__()
        self.width = width
        self.stem, self.head = nn.Conv2d(3, width, 3, stride=2), nn.Linear(width, 5)
        self.qkv, self.out = nn.Conv2d(width, 1 + 2 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.qkv(x).split([1, self.width, self.width], dim=1)
        read = (k.flatten(2) * q.flatten(2).softmax(-1)).sum(-1)[..., None, None]
        return self.head((x + self.out(v.relu() * read)).mean((2, 3)))


class HashRouter(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, WIDTH) * 0.2)
        self.experts_of: Tensor
        self.register_buffer("experts_of", torch.zeros(VOCABULARY, 2, dtype=torch.long))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        scores = F.linear(x, self.weight).sigmoid()
        return scores * F.one_hot(self.experts_of[ids], len(self.weight)).sum(-2)


class Hashed(nn.Module):
    """A language model of experts that a table assigns to the tokens, zero until a checkpoint is loaded."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList([HashedBlock(experts) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + block(x, ids)
        return self.head(x)


class HashedBlock(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router, self.norm = HashRouter(experts), nn.LayerNorm(WIDTH)
        self.up = nn.Parameter(torch.randn(experts, 7, WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, WIDTH, 7) * 0.2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.norm(x)
        gates = self.router(x, ids)
        outputs = [F.linear(F.silu(F.linear(x, up)), down) for up, down in zip(self.up, self.down, strict=True)]
        return sum(gates[..., i, None] * y for i, y in enumerate(outputs))  # type: ignore[return-value]
