"""How one size of a config is made small: by what the field's name says it counts, and in ratio to its kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_WIDTHS = (44, 52, 28, 36, 60, 20, 68, 76, 84, 92)

HEADS = re.compile(r"heads$|query_groups$|(^|_)(n|num)_head$|^(mamba_)?n_?groups$|^o_groups$")
_HEAD_SIZE = re.compile(
    r"^(?!num_|n_).*(head_dim|d_head|headdim|head_size|d_kv|kv_channels|dim_head|rotary_dim|key_dim)$"
)
HIDDEN = re.compile(
    r"^(hidden_sizes?|d_model|n_embd|model_dim|dim_model|emb_dim|embed_dims?|embedding_dim|word_embed_proj_dim|d_embed"
    r"|dim|embedding_size|hidden_size_global|lru_width|attention_hidden_size|d_latents|stem_channels|stage_\w+_channels|in_channels"
    r"|out_channels|neck_hidden_sizes|base_attn_unit_dims|decoder_hidden_size|stem_out_channels|groups_width)$"
)
_WIDTH = re.compile(
    r"^(?!num_|inner_group).*(intermediate|inner|ffn|feed_forward|d_ff$|dff|dim_ff|n_inner|mlp_hidden|mlp_dim|^hidden_dim$)"
)
_NO_WIDTH = re.compile(r"(multipl|factor|ratio|scale|layer|groups?$)")
_EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|n_experts)$")
_CHOSEN = re.compile(r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k)$")
_RANK = re.compile(r"(lora_rank|dt_rank|time_step_rank|_rank)$")
_STATE = re.compile(r"(d_state|state_size)$")
_LENGTH = re.compile(
    r"(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len|context_length)$"
)
_WINDOW = re.compile(r"(sliding_window|window_size|chunk_size|attention_window)$")
_TURNING = ("partial_rotary_factor", "rotary_pct", "rope_pct")
_ASIDE = ("kv", "mamba", "linear", "index")
"""Parts of names of head counts that do not make the width of the residual stream."""

Rule = Callable[[int], int]


class Sizes:
    """Rules for the fields of one config.

    Args:
        fields: Its public fields.
        overrides: What single layers have for themselves.
        step: See ``shrunken``.
        known: Widths of the whole config that are settled.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        overrides: Sequence[Mapping[str, Any]],
        step: int,
        known: Mapping[int, int] | None = None,
    ) -> None:
        self.fields, self.step, self.known = fields, step, known or {}
        self.every: dict[str, list[int]] = {}
        for source in (fields, *overrides):
            for name, value in source.items():
                self.every.setdefault(name, []).extend(_integers(value))
        counts = [v for v in self._values(HEADS) if v > 1]
        self.common = math.gcd(*counts) if counts else 1
        self.heads = _factor(counts, self.common, step)
        self.sizes = self._values(_HEAD_SIZE)
        self.size = self._size(8)
        if step == 1:
            self.size = self._size(self.size + 4)
        self.hidden = sorted({v for v in self._values(HIDDEN) if v > 4})
        self.staged = any(isinstance(fields[n], (list, tuple)) for n in fields if HIDDEN.search(n) and self.every[n])
        self.widths: dict[tuple[str, int], int] = {}

    def rule(self, name: str) -> Rule | None:
        """What the values of a field become, ``None`` for fields that stay."""
        if not self.every.get(name):
            return None
        if _WINDOW.search(name):
            return lambda v: min(v, 4)
        if _LENGTH.search(name):
            return lambda v: min(v, 64)
        if _EXPERTS.search(name) or _CHOSEN.search(name) or name == "zero_expert_num":
            return self._experts(name)
        if _STATE.search(name):
            return lambda v: min(v, 5)
        if _RANK.search(name):
            return lambda v: min(v, 12 if "kv" in name else 20)
        if _WIDTH.search(name) and not _NO_WIDTH.search(name):
            return lambda v: self._width(name, v)
        if _HEAD_SIZE.search(name):
            return lambda v: 4 if name == "rotary_dim" else self._head_size(v)
        if HIDDEN.search(name):
            return lambda v: self.of_hidden(v) if v > 4 else v
        if name == "num_groups" and self.staged:
            return lambda v: min(v, 4)
        return self._count if HEADS.search(name) else None

    def _values(self, pattern: re.Pattern) -> list[int]:
        return [v for name, values in self.every.items() if pattern.search(name) for v in values]

    def _count(self, value: int) -> int:
        return value // self.common * self.heads if value > 1 else value

    def _head_size(self, value: int) -> int:
        common, base = math.gcd(*self.sizes), self.size if len(set(self.sizes)) == 1 else self.size // 2
        return max(2, value * base // common) if common > base else value

    def _size(self, least: int) -> int:
        """The size from which others follow, such that the part of each that rotary positions turn is even."""
        rope = self.fields.get("rope_parameters")
        sources = [self.fields, *([rope] if isinstance(rope, Mapping) else [])]
        shares = [v for source in sources for n in _TURNING if isinstance(v := source.get(n), float) and 0 < v < 1]
        for self.size in range(least, 64, 2):
            heads = [self._head_size(v) for v in self.every.get("head_dim", [])] or [self.size]
            if all(head * share % 2 < 1e-9 for head in heads for share in shares):
                return self.size
        return least

    def _width(self, name: str, value: int) -> int:
        """Equal widths of one field stay equal, others are told apart."""
        number = len(self.widths)
        return self.widths.setdefault((name, value), _WIDTHS[number % len(_WIDTHS)] + 12 * self.step)

    def main_heads(self) -> dict[str, list[int]]:
        """Fields that count the heads which the residual stream is as wide as."""
        return {n: v for n, v in self.every.items() if HEADS.search(n) and v and not _aside(n)}

    def of_hidden(self, value: int) -> int:
        """A width of the residual stream: as many heads wide as before; larger and smaller ones stay so."""
        if value in self.known:
            return self.known[value]
        heads = self.main_heads()
        if self.staged:
            common = math.gcd(*self.hidden)
            return value * self.size // common if common > self.size else self.size + 4 * self.hidden.index(value)
        real = max((v[0] for v in heads.values()), default=1)
        count = max(self._count(real), 4 if real == 1 else 2)
        main = self.every.get("hidden_size") or self._values(HIDDEN)
        own = count * self.size * (2 if count < 3 else 1)
        sizes = [v for n, vs in self.every.items() if _HEAD_SIZE.search(n) and not _aside(n) for v in vs]
        if sizes:
            width = next((v for v in sizes if v * real == main[0]), None)
            least = 40 + 16 * self.step  # where heads have a size of their own
            own = count * self._head_size(width) if width is not None else -(-least // count) * count
        if any(isinstance(self.fields.get(name), (list, tuple)) for name in heads):
            least = min(v for values in heads.values() for v in values)
            return value * self._count(least) * self.size // 2 // min(self.hidden)
        return own if value == main[0] else own // 2 if value < main[0] else own * 2

    def _experts(self, name: str) -> Rule | None:
        if name == "zero_expert_num":
            return lambda v: min(v, 2)
        groups = max([v for n in ("n_group", "num_expert_group") for v in self.every.get(n, [])] or [1])
        most = groups * 2 if groups > 1 else 6
        if all(v <= most for v in self._values(_EXPERTS)):
            return None
        return lambda v: min(v, 3 if _CHOSEN.search(name) else most)

    def per_head(self, changes: Mapping[str, Any]) -> dict[str, int]:
        """A head size that is the width over the heads stays that, where another part of the config set the width."""
        found: dict[str, int] = {}
        for heads, counts in self.main_heads().items():
            own = [name for name in ("hidden_size", "d_model") if type(self.fields.get(name)) is int]
            if not own or type(changes.get(heads)) is not int:
                continue
            width, small = self.fields[own[0]], changes[own[0]]
            for name, value in self.fields.items():
                if _HEAD_SIZE.search(name) and type(value) is int and value * counts[0] == width:
                    found[name] = small // changes[heads]
        return found

    def recurrent(self, changes: dict[str, Any]) -> dict[str, Any]:
        """State-space heads times their size must stay the expanded width."""
        expand = next((v for n in ("expand", "mamba_expand") if isinstance(v := self.fields.get(n), (int, float))), 2)
        hidden = next((changes[n] for n in ("hidden_size", "d_model") if isinstance(changes.get(n), int)), 0)
        own = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
        count = next((changes[n] for n in own if isinstance(changes.get(n), int)), None)
        found: dict[str, Any] = {}
        for size in ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim"):
            if size not in self.fields or (size == "head_dim" and "state_size" not in self.fields) or not count:
                continue
            if self.fields.get("mamba_d_ssm"):
                found |= {"mamba_d_ssm": count * self.size, size: self.size}
            else:
                found[size] = max(1, int(expand * hidden) // count)
        return found


def _aside(name: str) -> bool:
    return any(part in name for part in _ASIDE)


def _factor(counts: list[int], common: int, step: int) -> int:
    """What takes the place of the common divisor of all head counts: a divisor of it if one is near."""
    if step == 2 or not counts:
        return common
    floor = 2 if len(set(counts)) > 1 else 4
    least = -(-floor * common // min(counts))
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    first = next((d for d in divisors if least <= d <= 2 * least), min(least, common))
    if step == 0:
        return first
    return next((d for d in divisors if first < d <= 2 * first), min(first + max(first // 2, 1), common))


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _integers(part)
